# One image for every Ray node: the checkout, installed in place. By itself it serves configs/demo.yaml, which without keys listens on loopback
# only: `docker run --network host specfleet`. With keys a port can be published; docs/operations.md shows how.
FROM python:3.11-slim

# gcc: compiles the kernels for the processor or the GPU that a replica finds itself on. wget: KubeRay's own health probes call it.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev wget && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --uid 1000 ray
WORKDIR /app
RUN chown ray:ray /app
ENV PYTHONUNBUFFERED=1 RAY_USAGE_STATS_ENABLED=0
# How Serve's processes talk, as services/cluster.py has it for a cluster that it starts itself.
ENV RAY_SERVE_USE_GRPC_BY_DEFAULT=1 RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP=0 RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD=0

# What is depended on, in a layer that a change of the code leaves as it is. PIP_ARGS: for instance an index of CPU-only wheels.
ARG PIP_ARGS=""
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN pip install --no-cache-dir $PIP_ARGS -c constraints.txt -e .

COPY --chown=ray:ray . .
RUN pip install --no-cache-dir --no-deps -e .

USER ray
EXPOSE 8000
CMD ["specfleet", "serve", "configs/demo.yaml"]
