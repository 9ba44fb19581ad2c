{
  imports = [ ../modules/common.nix ../modules/web.nix ];
  networking.hostName = "web1";
}
