"""A WebSocket server, and clients of it through a gateway.

`websocket.py serve` serves on a port of its own, which it prints: it sends back what it gets, after the
path and the key that it was asked with. `websocket.py ask ADDRESS` asks it through the gateway.
"""

import sys

from websockets.sync.client import connect
from websockets.sync.server import serve


def answer(socket):
    socket.send(f"{socket.request.path} {socket.request.headers.get('Authorization')}")
    for message in socket:
        socket.send(message)


def check(fact, what):
    if not fact:
        sys.exit(f"not so: {what}")


if sys.argv[1] == "serve":
    with serve(answer, "127.0.0.1", 0, subprotocols=["realtime"], max_size=None) as server:
        print(server.socket.getsockname()[1], flush=True)
        server.serve_forever()

url = f"ws://{sys.argv[2]}/v1/realtime?model=rt"
headers = {"Authorization": "Bearer sk-clients"}
with connect(url, additional_headers=headers, subprotocols=["realtime"], max_size=None) as socket:
    check(socket.subprotocol == "realtime", "the subprotocol is agreed on")
    check(socket.recv() == "/v1/realtime?model=gpt-realtime Bearer sk-backend", "model and key")
    for message in ["hello", "x" * 5_000_000, bytes(range(256)) * 1000, ""]:
        socket.send(message)
        check(socket.recv() == message, f"a message of {len(message)} comes back")
browser = ["realtime", "openai-insecure-api-key.sk-clients"]
with connect(url, subprotocols=browser) as socket:
    check(socket.recv().endswith("Bearer sk-backend"), "a browser's key is taken")
for round in range(50):
    with connect(url, additional_headers=headers, subprotocols=["realtime"]) as socket:
        socket.recv()
        socket.send(str(round))
        check(socket.recv() == str(round), "one after the other")
print("all fine")
