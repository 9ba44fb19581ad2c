# What a machine runs of toto: the gate, which is the login shell of toto's user there; and, as root, the helper, the agent
# that asks toto, what goes on with an update after a boot, and what makes room on the disk.
#
#   pkgs.callPackage ./nix/flying-monkey-package.nix { }
{ lib, stdenvNoCC, python3 }:
stdenvNoCC.mkDerivation {
  pname = "flying-monkey";
  inherit ((lib.importTOML ../pyproject.toml).project) version;
  src = lib.fileset.toSource {
    root = ../.;
    fileset = lib.fileset.fileFilter (file: file.hasExt "py" || file.hasExt "sh") ../flying_monkey;
  };
  dontConfigure = true;
  # (Without bytecode a first start would take seconds on a small machine.)
  buildPhase = "${python3.interpreter} -m compileall -q --invalidation-mode unchecked-hash flying_monkey";
  installPhase = ''
    mkdir -p $out/lib/flying-monkey $out/bin
    cp -r flying_monkey $out/lib/flying-monkey
    for each in gate helper agent update garbage; do
      [ -e flying_monkey/$each.py ] || continue
      cat > $out/bin/flying-monkey-$each <<END
    #!${python3.interpreter} -IS
    import sys
    sys.path.insert(0, "$out/lib/flying-monkey")
    from flying_monkey.$each import main
    main()
    END
      chmod 755 $out/bin/flying-monkey-$each
    done
  '';
  passthru.shellPath = "/bin/flying-monkey-gate";
  meta = {
    description = "What a machine of a fleet runs of toto";
    license = lib.licenses.mit;
  };
}
