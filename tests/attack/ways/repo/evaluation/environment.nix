# says: got \["","","","","",""\]
map builtins.getEnv [ "CANARY" "PREFECT_API_AUTH_STRING" "PREFECT_API_URL" "TOTO_STATE" "HOME" "USER" ]
