# says: attribute 'getFlake' missing
(builtins.getFlake "path:@VICTIM@/state").outPath
