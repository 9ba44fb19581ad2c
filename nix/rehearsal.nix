# What toto adds to a host's VM. It adds nothing to the host: `virtualisation.vmVariant` changes only `system.build.vm`,
# so the toplevel keeps its derivation. It must be the same in every run, or the derivation of the VM would change.
#
# The sandbox has two cards: toto logs in through `toto-mgmt`; the other is the only way to the internet, and the host's
# own configuration sets it up. The operator has to replace what only the real machine has (secrets, disks, static
# addresses) in `virtualisation.vmVariant`.
{ sandboxKey    # the public key that logs in as root
, ports ? [ ]   # more ports of the guest that tests may use through the management card
, builder ? "x86_64-linux"  # the system of the machine that runs the VM
}:
{
  _file = "toto's nix/rehearsal.nix";
  virtualisation.vmVariant = { config, lib, options, pkgs, ... }:
    let
      card = "toto-mgmt";
      networkd = config.systemd.network.enable or false;
      # It wins over a host's own mkForce (50).
      force = lib.mkOverride 10;
      # A configuration for an option that not every NixOS has.
      where = declared: lib.optionalAttrs declared;
      keys = "ssh/toto_sandbox_keys";
      nftables = config.networking.nftables;
      guarded = nftables.enable && (
        !config.networking.firewall.enable || nftables.ruleset != "" || nftables.rulesetFile != null
        || removeAttrs (nftables.tables or { }) [ "nixos-fw" "nixos-nat" "nixos-nat6" ] != { }
      );
    in
    lib.mkMerge [
      {
        virtualisation.graphics = force false;      # the console is the serial line
        virtualisation.forwardPorts = force [ ];    # fixed ports could clash, guestfwd would open the sandbox

        # The card has the MAC address that QEMU gives to the first card of a VM. udev renames it, whatever configures
        # the network; the 00- puts this rule before all rules of the host.
        systemd.network.links."00-${card}" = {
          matchConfig.PermanentMACAddress = "52:54:00:12:34:56";
          linkConfig.Name = card;
        };
        systemd.network.networks."00-${card}" = lib.mkIf networkd {
          matchConfig.Name = card;
          networkConfig.DHCP = "ipv4";
        };
        networking.interfaces.${card}.useDHCP = force (!networkd);
        networking.dhcpcd.enable = lib.mkIf (!networkd) (force true);
        networking.networkmanager.unmanaged = [ "interface-name:${card}" ];
        networking.firewall.interfaces.${card}.allowedTCPPorts = [ 22 ] ++ ports;

        # (Not among root's own keys: a host may mkForce those.)
        environment.etc.${keys} = { text = sandboxKey + "\n"; mode = "0444"; };
        services.openssh = {
          enable = force true;
          startWhenNeeded = force false;
          listenAddresses = force [ ];
          # The sandbox does not have the host's keys, which are secret; an RSA key would take an emulated machine a
          # minute.
          hostKeys = force [ { type = "ed25519"; path = "/etc/ssh/ssh_host_ed25519_key"; } ];
          # The host's own sshd settings stay, since tests may check them; this only lets root log in on port 22.
          extraConfig = lib.mkMerge [
            (lib.mkBefore (lib.optionalString (! lib.elem 22 config.services.openssh.ports) "Port 22\n"))
            (lib.mkAfter ''
              Match User root LocalPort 22
                PermitRootLogin prohibit-password
                PubkeyAuthentication yes
                AuthenticationMethods publickey
                AuthorizedKeysFile /etc/${keys} /etc/ssh/authorized_keys.d/%u
                AllowUsers root
                AllowGroups *
                DenyUsers none-is-denied
                DenyGroups none-is-denied
            '')
          ];
        };
      }
      # A container has no kernel of its own; its VM does.
      (where ((options.boot or { }) ? isContainer) { boot.isContainer = force false; })
      # QEMU boots the kernel itself; a container's boot loader and the VM's would be one too many.
      (where (options.virtualisation ? useBootLoader) {
        system.build.installBootLoader =
          lib.mkIf (!config.virtualisation.useBootLoader) (force "${pkgs.coreutils}/bin/true");
      })
      # The keys of an sshd in the initrd are the real machine's secrets, and nobody has to unlock the VM's disk.
      (where ((options.boot.initrd or { }) ? network) { boot.initrd.network.ssh.enable = force false; })
      # The VM of a host for a different kind of processor runs under this machine's QEMU.
      (where (options.virtualisation ? host) {
        virtualisation.host.pkgs = lib.mkIf (pkgs.stdenv.hostPlatform.system != builder)
          (force (import pkgs.path { system = builder; }));
      })
      # Rules of the host's own may drop what comes in by a card that they do not know.
      (where (options.networking ? nftables) {
        systemd.services."${card}-open" = lib.mkIf guarded {
          description = "let toto in by its card, before the host's own nftables rules";
          wantedBy = [ "multi-user.target" ];
          after = [ "nftables.service" ];
          partOf = [ "nftables.service" ];
          path = [ pkgs.nftables pkgs.gawk ];
          serviceConfig = { Type = "oneshot"; RemainAfterExit = true; };
          script = ''
            nft list chains | awk '
              $1 == "table" { table = $2 " " $3 }
              $1 == "chain" { chain = $2 }
              /hook input/ { print table, chain, "iifname" }
              /hook output/ { print table, chain, "oifname" }
            ' | while read -r family table chain name; do
              nft insert rule "$family" "$table" "$chain" "$name" ${card} accept
            done
          '';
        };
      })
    ];
}
