# says: gitmodules|refused|rejected|fsck|is a submodule
git config -f .gitmodules submodule.x.path x
git config -f .gitmodules submodule.x.url 'ext::sh -c "touch @VICTIM@/state/new"'
git config -f .gitmodules submodule.x.update '!touch @VICTIM@/state/new'
git update-index --add --cacheinfo 160000,$(git rev-parse HEAD),x
git add .gitmodules && git commit -qm submodule
git push $OPTIONS toto HEAD:$REF
git config -f .gitmodules submodule.x.url '--upload-pack=touch @VICTIM@/state/new'
git add .gitmodules && git commit -qm submodule
git push $OPTIONS toto HEAD:$REF
