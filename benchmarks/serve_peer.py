"""llama-server, out of the wheel xllamacpp, on a port of this machine: the peer of benchmarks/serve.py."""

import sys
import time

import xllamacpp


def main() -> None:
    """Arguments: model.gguf, mmproj.gguf, port, requests at the same time, context of each."""
    model, vision, port, parallel, context = sys.argv[1:]
    params = xllamacpp.CommonParams()
    params.model.path, params.mmproj.path = model, vision
    params.hostnames, params.port = ["127.0.0.1"], int(port)
    params.n_parallel, params.n_ctx = int(parallel), int(parallel) * int(context)
    server = xllamacpp.Server(params)
    print(server, flush=True)
    while True:
        time.sleep(60)


if __name__ == "__main__":
    main()
