# says: Could not open .@VICTIM@/state/keys/machines|No such file
{ ... }: { imports = [ ../lab.nix ]; virtualisation.qemu.options = [ "-drive" "file=@VICTIM@/state/keys/machines,if=virtio,format=raw,readonly=on" ]; }
