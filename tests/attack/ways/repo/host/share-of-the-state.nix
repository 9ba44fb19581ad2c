# says: failed to open|No such file|cannot
{ ... }: { imports = [ ../lab.nix ]; virtualisation.qemu.options = [ "-virtfs" "local,path=@VICTIM@,security_model=none,mount_tag=x" ]; }
