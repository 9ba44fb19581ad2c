# says: machines.yaml:[0-9]+
cat > machines.yaml <<'YAML'
machines:
  - {name: ../../keys/machines, address: 10.0.0.1}
  - {name: "web1 -oProxyCommand=id", address: 10.0.0.1}
  - {name: web2, address: "-oProxyCommand=touch @VICTIM@/state/new"}
  - {name: web3, address: 10.0.0.1, ssh: {identity: "@VICTIM@/state/keys/machines"}}
  - {name: web4, address: 10.0.0.1, ssh: {identity: ../../../keys/machines}}
  - {name: web5, address: 10.0.0.1, ssh: {user: "root -oProxyCommand=id", host_key: "ssh-ed25519 AAAA\n* ssh-ed25519 AAAA"}}
  - {name: web6, address: 127:0:0:1, ports: [1:20]}
  - {name: web7, address: 10.0.0.1, system: "x86_64-linux --builders ssh://x"}
YAML
git add . && git commit -qm manifest
git push $OPTIONS toto HEAD:$REF
