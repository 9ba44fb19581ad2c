# says: guestfwd|Connection refused|failed|Failed|refused
{ ... }: { imports = [ ../lab.nix ]; virtualisation.qemu.options = [ "-chardev" "socket,id=x,host=127.0.0.1,port=@TCP@" "-netdev" "user,id=n,guestfwd=tcp:10.0.2.100:80-cmd:cat @VICTIM@/state/canary" ]; }
