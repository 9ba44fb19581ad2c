# One host of an exported infra repo: its toplevel, and the VM in which it is rehearsed.
#
# The toplevel is evaluated exactly as the operator wrote it. toto adds its own module to the VM variant only, so the
# rehearsed closure is the one that is copied to the machine.
{ tree                 # the exported commit: its absolute path; for a flake its locked reference (path:…?narHash=…)
, name                 # the host
, file ? ""            # its file relative to the tree; "" when it is nixosConfigurations.NAME of the flake
, nixpkgs ? ""         # "" for <nixpkgs>; a different <name>; or a file of the tree that gives nixpkgs' path, or nixpkgs
, system ? builtins.currentSystem or "x86_64-linux"  # (pure evaluation has none; a flake says its own)
, builder ? builtins.currentSystem or "x86_64-linux"  # the system of this machine, which runs the VM
, sandboxKey ? ""      # the public key that may log in to the sandbox
, ports ? "[]"         # JSON: more ports of the sandbox that tests may use
, rehearsal ? import ./rehearsal.nix  # toto's module (pure evaluation cannot read that file, and gets it)
}:
let
  root = /. + tree;
  added = rehearsal { inherit sandboxKey; ports = builtins.fromJSON ports; inherit builder; };

  searched = builtins.match "<(.+)>" nixpkgs;
  pinned = import (/. + (if builtins.substring 0 1 nixpkgs == "/" then nixpkgs else "${tree}/${nixpkgs}"));
  nixosOf =
    if nixpkgs == "" then <nixpkgs/nixos>
    else if searched != null then builtins.findFile builtins.nixPath "${builtins.head searched}/nixos"
    else (pinned.path or pinned) + "/nixos";
  fromFile = configuration: (import nixosOf { inherit configuration system; }).config;

  # What the VM asks for, in MB, in the name of a derivation that is never built: its memory, and all its disks. 0 where
  # the host does not say.
  sizesOf = config:
    let
      of = config.virtualisation.vmVariant.virtualisation or { };
      number = value: if builtins.isInt value then value else 0;
      disks = map (disk: number (disk.size or disk)) (of.emptyDiskImages or [ ]);
      disk = builtins.foldl' builtins.add (number (of.diskSize or 0)) disks;
    in
    derivation {
      name = "vm-sizes-${toString (number (of.memorySize or 0))}-${toString disk}";
      system = "none";
      builder = "none";
    };

  flake = builtins.getFlake (if builtins.substring 0 1 tree == "/" then "path:${tree}" else tree);
  configured = flake.nixosConfigurations.${name};
in
let
  plain = if file != "" then fromFile (root + "/${file}") else configured.config;
  rehearsed =
    if file != "" then fromFile { imports = [ (root + "/${file}") added ]; }
    else (configured.extendModules { modules = [ added ]; }).config;
in
{
  inherit (plain.system.build) toplevel;
  inherit (rehearsed.system.build) vm;
  sizes = sizesOf rehearsed;
}
