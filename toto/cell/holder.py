"""Holds a network namespace, and makes sockets in it for toto.

    python -I -S toto/cell/holder.py

It runs in the namespace, with a socket of toto's as its standard input. For each request, a line `connect` or
`listen ADDRESS PORT`, it makes a TCP socket there and sends it back, or a line with the error. A socket stays in the
namespace in which it was made, whoever has it. First it says `ready`. It ends when toto does.
"""

import socket

with socket.socket(fileno=0) as toto:
    toto.send(b"ready")
    while request := toto.recv(200):
        word, *place = request.decode().split()
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as made:
                if word == "listen":
                    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    made.bind((place[0], int(place[1])))
                    made.listen(64)
                socket.send_fds(toto, [b"made"], [made.fileno()])
        except OSError as error:
            toto.send(str(error.strerror).encode())
