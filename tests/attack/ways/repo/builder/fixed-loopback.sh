#!/bin/sh
# says: ended fixed-loopback
# network
for address in 127.0.0.1 localhost 10.0.2.2 198.18.0.2 192.0.2.2 @ADDRESSES@; do
    for port in @TCP@ @API@; do printf 'GET /api/health HTTP/1.0\r\n\r\n' | nc -w 2 $address $port; done
done
echo ended fixed-loopback
