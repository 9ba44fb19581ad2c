# What toto adds to a host's VM. It adds nothing to the host: `virtualisation.vmVariant` changes only `system.build.vm`,
# so the toplevel keeps its derivation. It must be the same in every run, or the derivation of the VM would change.
#
# The sandbox has two cards: toto logs in through `toto-mgmt`; the other is the only way to the internet, and the host's
# own configuration sets it up. The operator has to replace what only the real machine has (secrets, disks, static
# addresses) in `virtualisation.vmVariant`.
{ sandboxKey    # the public key that logs in as root
, ports ? [ ]   # more ports of the guest that tests may use through the management card
}:
{
  virtualisation.vmVariant = { config, lib, ... }:
    let
      card = "toto-mgmt";
      networkd = config.systemd.network.enable or false;
    in
    {
      virtualisation.graphics = lib.mkForce false;      # the console is the serial line
      virtualisation.forwardPorts = lib.mkForce [ ];    # fixed ports could clash, guestfwd would open the sandbox

      # The card has the MAC address that QEMU gives to the first card of a VM. udev renames it, whatever configures the
      # network; the 00- puts this rule before all rules of the host.
      systemd.network.links."00-${card}" = {
        matchConfig.PermanentMACAddress = "52:54:00:12:34:56";
        linkConfig.Name = card;
      };
      systemd.network.networks."00-${card}" = lib.mkIf networkd {
        matchConfig.Name = card;
        networkConfig.DHCP = "ipv4";
      };
      networking.interfaces.${card}.useDHCP = lib.mkForce (!networkd);
      networking.dhcpcd.enable = lib.mkIf (!networkd) (lib.mkForce true);
      networking.networkmanager.unmanaged = [ "interface-name:${card}" ];
      networking.firewall.interfaces.${card}.allowedTCPPorts = [ 22 ] ++ ports;

      users.users.root.openssh.authorizedKeys.keys = [ sandboxKey ];
      services.openssh = {
        enable = lib.mkForce true;
        startWhenNeeded = lib.mkForce false;
        listenAddresses = lib.mkForce [ ];
        # The sandbox does not have the host's keys, which are secret; an RSA key would take an emulated machine a minute.
        hostKeys = lib.mkForce [ { type = "ed25519"; path = "/etc/ssh/ssh_host_ed25519_key"; } ];
        # The host's own sshd settings stay, since tests may check them; this only lets root log in on port 22.
        extraConfig = lib.mkMerge [
          (lib.mkBefore (lib.optionalString (! lib.elem 22 config.services.openssh.ports) "Port 22\n"))
          (lib.mkAfter ''
            Match User root LocalPort 22
              PermitRootLogin prohibit-password
              PubkeyAuthentication yes
              AuthenticationMethods publickey
              AuthorizedKeysFile /etc/ssh/authorized_keys.d/%u
              AllowUsers root
              AllowGroups *
              DenyUsers none-is-denied
              DenyGroups none-is-denied
          '')
        ];
      };
    };
}
