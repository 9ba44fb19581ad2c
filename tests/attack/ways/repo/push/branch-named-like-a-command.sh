# says: is accepted|is not deployed|rehearsing|planning|may rehearse|plan of
for name in '$(touch${IFS}@VICTIM@/state/new)' '`id`' '"},"x":"' "';id;'" '-oProxyCommand=id' 'a|id' 'é‮'; do git push -o skip toto "+HEAD:refs/heads/$name"; done
