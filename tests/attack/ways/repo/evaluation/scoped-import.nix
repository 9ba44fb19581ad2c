# says: forbidden in restricted mode
scopedImport { builtins = { }; } "@VICTIM@/repos/vault.git/config"
