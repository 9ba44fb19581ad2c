# says: hg failed|executing .*hg
# Its settings name hooks; a commit may have such a folder.
builtins.fetchMercurial "/infra"
