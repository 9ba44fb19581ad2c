# What toto adds to a host's VM, and nothing to the host: `virtualisation.vmVariant` reaches `system.build.vm` only,
# so the toplevel keeps its derivation. It must be the same from run to run, or the VM's would change.
#
# The sandbox has two cards: `toto-mgmt`, by which toto logs in, and the host's one way to the internet, which is
# left to the host's own configuration. What only the real machine has (secrets, disks, static addresses) is the
# operator's to stub in `virtualisation.vmVariant`.
{ sandboxKey    # the public key that logs in as root
, ports ? [ ]   # further ports of the guest that tests reach through the management card
}:
{
  virtualisation.vmVariant = { config, lib, ... }:
    let
      card = "toto-mgmt";
      networkd = config.systemd.network.enable or false;
    in
    {
      virtualisation.graphics = lib.mkForce false;      # the console is the serial line
      virtualisation.forwardPorts = lib.mkForce [ ];    # fixed ports would collide, guestfwd would open the sandbox

      # Found by the MAC that QEMU gives to a VM's first card. udev renames it whoever configures the network,
      # and the 00- goes before every rule of the host that would match it too.
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
        # A host's keys are secrets that the sandbox has not, and RSA takes an emulated machine a minute.
        hostKeys = lib.mkForce [ { type = "ed25519"; path = "/etc/ssh/ssh_host_ed25519_key"; } ];
        # The host's own sshd settings stay as they are, for tests look at them; only root on port 22 is let in.
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
