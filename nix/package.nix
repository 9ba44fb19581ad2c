# toto as a package: a Python environment with exactly the versions of requirements.lock, and toto's own code.
#
#   pkgs.callPackage ./nix/package.nix { }
#
# The environment is a venv in the store. Its packages are the files that requirements.lock names, by their hashes, and
# not nixpkgs' own: Prefect's server does not run with just any version of what it stands on (see pyproject.toml).
{ lib, stdenv, stdenvNoCC, runtimeShell, python312, autoPatchelfHook, cacert }:
let
  python = python312;
  system = stdenv.hostPlatform.system;
  project = (lib.importTOML ../pyproject.toml).project;
  lock = ../requirements.lock;

  # What `download` leaves, as a whole. When they are wrong, tests/nix/test_module.py prints the right ones.
  hashes = {
    x86_64-linux = "sha256-xM+2gAVzm/BuNsme5BInySvMjzNqmWIcIsuozwBtyg4=";
    aarch64-linux = "sha256-ExLUIC2e2jsOW9tEjQ7uuNgKw3ch5yh4nPf7qP9cZwM=";
  };
  # (What is named here decides which file of a version is taken, whatever builds it.)
  download = [ "pip" "download" "--quiet" "--no-deps" "--require-hashes" "--no-build-isolation" ]
    ++ [ "--implementation=cp" "--python-version=3.12" "--abi=cp312" "--abi=abi3" "--abi=none" ]
    ++ map (each: "--platform=${each}_${stdenv.hostPlatform.parsed.cpu.name}")
      [ "manylinux_2_28" "manylinux_2_17" "manylinux2014" ]
    ++ [ "--platform=any" "--requirement=${lock}" ];

  tools = python.withPackages (each: [ each.pip each.setuptools each.wheel ]);

  wheels = stdenvNoCC.mkDerivation {
    # A new lock file has a new name: nix would take an older output of this hash for it.
    name = "toto-wheels-${builtins.substring 0 12 (builtins.hashFile "sha256" lock)}";
    nativeBuildInputs = [ tools ];
    env.PIP_CERT = "${cacert}/etc/ssl/certs/ca-bundle.crt";
    impureEnvVars = lib.fetchers.proxyImpureEnvVars;
    buildCommand = "HOME=$TMPDIR python3 -m ${lib.escapeShellArgs download} --dest $out";
    outputHashMode = "recursive";
    outputHash = hashes.${system} or (throw "toto: nix/package.nix has no wheels for ${system}");
  };

  # What toto itself depends on; the lock has what its tests need besides.
  environment = stdenv.mkDerivation {
    name = "toto-environment-${project.version}";
    nativeBuildInputs = [ tools autoPatchelfHook ];
    buildInputs = [ stdenv.cc.cc.lib ];
    dontUnpack = true;
    dontStrip = true;
    installPhase = ''
      ${python.interpreter} -m venv --without-pip $out
      HOME=$TMPDIR python3 -m pip --python $out/bin/python3 install --quiet --no-index --find-links ${wheels} \
        --no-build-isolation --no-compile --ignore-installed ${lib.escapeShellArgs project.dependencies}
      # (Every file in the store is of 1970: by its time no bytecode would be that of its source.)
      $out/bin/python3 -m compileall -q -j 0 --invalidation-mode unchecked-hash $out/lib
    '';
  };
in
stdenvNoCC.mkDerivation {
  pname = "toto";
  inherit (project) version;
  # As in a checkout: toto finds prefect.yaml and nix/ beside its code.
  src = lib.fileset.toSource {
    root = ../.;
    fileset = lib.fileset.unions ([ ../prefect.yaml ./evaluate.nix ./rehearsal.nix ]
      ++ map (lib.fileset.fileFilter (file: !file.hasExt "pyc")) [ ../blocks ../flows ../flying_monkey ../tasks ../toto ]);
  };
  dontConfigure = true;
  buildPhase = "${environment}/bin/python3 -m compileall -q --invalidation-mode unchecked-hash blocks flows flying_monkey tasks toto";
  installPhase = ''
    mkdir -p $out/share $out/bin
    cp -r . $out/share/toto
    for each in toto:toto.cli toto-git-shell:toto.git_host.shell; do
      cat > $out/bin/''${each%%:*} <<END
    #!${runtimeShell}
    PYTHONPATH=$out/share/toto PYTHONNOUSERSITE=1 exec ${environment}/bin/python3 -P -m ''${each#*:} "\$@"
    END
      chmod 755 $out/bin/''${each%%:*}
    done
  '';
  passthru = { inherit python environment wheels download; };
  meta = {
    inherit (project) description;
    mainProgram = "toto";
    license = lib.licenses.mit;
    platforms = lib.attrNames hashes;
  };
}
