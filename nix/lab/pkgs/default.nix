# The lab's `pkgs`: four pinned trees and the trivial builders of nixpkgs.
#
# The trees come from Debian packages and are put into the store by `python -m tests.lab setup`. Here they
# are fixed-output derivations of the same name and hash, so they have the same store path, are
# never built, evaluate in pure mode, and a derivation that uses one depends on its content only.
{ system, lib, pinned }:
let
  pin = name: derivation {
    inherit name system;
    builder = "/bin/sh";
    args = [ "-c" "echo 'this tree of the lab is not in the store: run `python -m tests.lab setup`' >&2; exit 1" ];
    outputHashMode = "recursive";
    outputHashAlgo = "sha256";
    outputHash = pinned.${name};
  };

  # Every build of the lab has a static busybox as its builder, and uses nothing of the building machine.
  build = name: attrs: script: derivation ({
    inherit name system;
    builder = "${tools}/bin/busybox";
    args = [ "sh" "-euc" "export PATH=${tools}/bin\n${script}" ];
    preferLocalBuild = true;
    allowSubstitutes = false;
  } // attrs);

  # Programs of `tools` that are not static run through the loader and libraries next to them.
  tool = name: "${tools}/lib/ld.so --library-path ${tools}/lib ${tools}/bin/${name}";

  base = pin "lab-base" // { version = pinned.version; };
  tools = pin "lab-tools";
  python = pin "lab-python";
  kernel = pin "lab-kernel";

  writeTextFile = { name, text, executable ? false, destination ? "", meta ? { } }:
    build name { inherit text; passAsFile = [ "text" ]; } ''
      target="$out${destination}"
      mkdir -p "$(dirname "$target")"
      cp "$textPath" "$target"
      ${lib.optionalString executable "chmod +x \"$target\""}
    '' // { inherit meta; };
  script = interpreter: name: text: writeTextFile {
    inherit name;
    executable = true;
    text = "#!${interpreter}\n${text}";
  };
  scriptBin = interpreter: name: text: writeTextFile {
    inherit name;
    executable = true;
    destination = "/bin/${name}";
    text = "#!${interpreter}\n${text}";
    meta.mainProgram = name;
  };
in
{
  inherit lib system build tool tools kernel base writeTextFile;
  stdenv.hostPlatform = { inherit system; };
  stdenv.system = system;
  config = { };

  # One tree holds every program of the guest; each name is that tree, so ${pkgs.busybox}/bin/httpd works.
  bash = base;
  bashInteractive = base;
  busybox = base;
  coreutils = base;
  iproute2 = base;
  nix = base;
  openssh = base;
  sudo = base;
  python3 = python // { interpreter = "${python}/bin/python3"; };
  runtimeShell = "${base}/bin/bash";

  writeText = name: text: writeTextFile { inherit name text; };
  writeTextDir = path: text: writeTextFile { name = baseNameOf path; inherit text; destination = "/${path}"; };
  writeScript = name: text: writeTextFile { inherit name text; executable = true; };
  writeScriptBin = name: text: writeTextFile { inherit name text; executable = true; destination = "/bin/${name}"; };
  writeShellScript = script "${base}/bin/bash";
  writeShellScriptBin = scriptBin "${base}/bin/bash";
  writeShellApplication = { name, text, ... }: scriptBin "${base}/bin/bash" name "set -euo pipefail\n${text}";
  runCommand = name: attrs: text: build name ({ preferLocalBuild = false; } // attrs) text;  # (as in nixpkgs)
  runCommandLocal = name: attrs: text: build name attrs text;

  # All files of `paths`, one symlink each; the first one that has a file wins.
  buildEnv = { name, paths, ... }: build name { inherit paths; } ''
    mkdir -p $out/bin
    for path in $paths; do
      cd "$path"
      for dir in bin sbin etc share; do
        [ -d "$dir" ] || continue
        find -L "$dir" -type d | while read -r d; do mkdir -p "$out/$d"; done
        find "$dir/" ! -type d | while read -r f; do
          [ -e "$out/$f" ] || [ -L "$out/$f" ] || echo "$path/$f $out/$f"
        done
      done
    done | xargs -r -n 2 ln -sf
  '';
  symlinkJoin = { name, paths, ... }: build name { inherit paths; } ''
    mkdir -p $out
    for path in $paths; do cp -rsf "$path/." $out/ 2>/dev/null || cp -rs "$path/." $out/; chmod -R u+w $out; done
  '';
}
