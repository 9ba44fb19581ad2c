# What a machine runs of toto: its own NixOS module, with a package that the lab can build.
{ lib, pkgs, ... }:
let
  source = ../../flying-monkey/flying_monkey;
in
{
  imports = [ ../../flying-monkey/nix/flying-monkey.nix ];

  services.flying-monkey.package = lib.mkDefault (pkgs.runCommand "flying-monkey" { inherit source; } ''
    mkdir -p $out/lib/flying-monkey $out/bin
    cp -r $source $out/lib/flying-monkey/flying_monkey
    chmod -R u+w $out/lib/flying-monkey
    PYTHONHOME=${pkgs.python3} PYTHONHASHSEED=0 \
      ${pkgs.base}/lib64/ld-linux-x86-64.so.2 --library-path ${pkgs.base}/lib/x86_64-linux-gnu ${pkgs.python3}/bin/python3 \
      -IS -m compileall -q --invalidation-mode unchecked-hash -s $out -p $out $out/lib/flying-monkey
    for each in agent gate helper update; do
      [ -e $source/$each.py ] || continue
      cat > $out/bin/flying-monkey-$each <<END
    #!${pkgs.python3.interpreter} -IS
    import sys
    sys.path.insert(0, "$out/lib/flying-monkey")
    from flying_monkey.$each import main
    main()
    END
      chmod 755 $out/bin/flying-monkey-$each
    done
  '' // { shellPath = "/bin/flying-monkey-gate"; });
}
