# says: was not found in the Nix search path
<toto/state/canary>
