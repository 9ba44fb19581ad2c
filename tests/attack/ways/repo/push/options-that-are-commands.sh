# says: is not known
git push -o 'only=$(touch @VICTIM@/state/new)' toto HEAD:$REF
git push -o 'plan;id' toto HEAD:$REF
git push -o "only=\"}],\"commit\":\"x" toto HEAD:$REF
