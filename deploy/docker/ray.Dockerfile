# docker build -f deploy/docker/ray.Dockerfile -t sink-vllm:ray .
# The GPU image with Ray, for deploy/ray: the extra `ray` of pyproject.toml.
FROM sink-vllm:gpu

RUN pip install --no-cache-dir 'ray[serve]==2.60.*' 'pyarrow>=17'
# Ray's operator says what runs.
ENTRYPOINT []
