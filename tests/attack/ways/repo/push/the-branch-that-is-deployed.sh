# says: may rehearse infra, but not deploy it
# by: rehearser
for options in '' '-o plan' '-o rehearse' '-o skip'; do git push $options toto +HEAD:main; done
git push toto :main
