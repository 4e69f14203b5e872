# docker build -f deploy/docker/gpu.Dockerfile -t sink-vllm:gpu .
# The line of vLLM that this release supports (pyproject.toml); its entry point is `vllm serve`.
FROM vllm/vllm-openai:v0.32.0

WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY sink_vllm sink_vllm
# Without extras: vLLM and torch are those of the image.
RUN pip install --no-cache-dir . && rm -rf /src
WORKDIR /
