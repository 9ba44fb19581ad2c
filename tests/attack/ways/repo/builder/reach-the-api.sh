#!/bin/sh
# says: ended reach-the-api
for address in 127.0.0.1 localhost 0.0.0.0 @ADDRESS@ ::1; do
    for port in @TCP@ @API@; do printf 'GET /api/admin/version HTTP/1.0\r\n\r\n' | nc -w 2 $address $port; done
done
echo ended reach-the-api
