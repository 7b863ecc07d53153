# One image for every Ray node: the checkout, installed in place. By itself it serves configs/demo.yaml, which without keys listens on loopback
# only: `docker run --network host specfleet`. With keys a port can be published; docs/operations.md shows how.
FROM python:3.11-slim

# wget: KubeRay's health probes call it. gcc: compiles the CPU kernels for the processor that a replica finds itself on.
RUN apt-get update && apt-get install -y --no-install-recommends wget gcc libc6-dev && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --uid 1000 ray
WORKDIR /app
RUN chown ray:ray /app
ENV PYTHONUNBUFFERED=1 RAY_USAGE_STATS_ENABLED=0

COPY --chown=ray:ray . .
RUN pip install --no-cache-dir -c constraints.txt -e .

USER ray
EXPOSE 8000
CMD ["specfleet", "serve", "configs/demo.yaml"]
