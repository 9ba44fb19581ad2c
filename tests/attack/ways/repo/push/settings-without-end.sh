# says: toto.toml
cat > toto.toml <<'TOML'
[nix]
evaluate_timeout = 600000
evaluate_memory = 16000000
nixpkgs = "../../../@VICTIM@"
signing_key = "@VICTIM@/state/keys/machines"
[sandbox]
memory = 1000000
test_output = 1000000000
[terraform.roots."../../x"]
path = "../../.."
var_files = ["/etc/passwd", "@VICTIM@/state/canary"]
backend_config = ["@VICTIM@/state/canary", "path=@VICTIM@/state/new"]
TOML
git add . && git commit -qm settings
git push $OPTIONS toto HEAD:$REF
