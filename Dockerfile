# The server, without a model: mount one at /model.
#
#   docker build -t lazyllm .
#   docker run --rm --read-only --tmpfs /tmp -p 127.0.0.1:8000:8000 \
#       -e LAZYLLM_API_KEY=... -v /path/of/model:/model:ro lazyllm
#
# What is written behind the image's name goes to `lazyllm serve`: --preset recommended-fast, say.
# docs/deployment.md says more.

ARG PYTHON=3.11.14-slim-bookworm

FROM python:${PYTHON} AS build

# Another torch than the index's own, which brings CUDA: --build-arg TORCH_INDEX=URL of an index with CPU builds.
ARG TORCH=torch==2.13.0
ARG TORCH_INDEX=

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

RUN python -m venv /opt/lazyllm
ENV PATH=/opt/lazyllm/bin:$PATH

# torch in a layer of its own: it is large, and seldom another one.
RUN pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$TORCH"

WORKDIR /src
COPY . .
RUN pip install -c constraints.txt ".[serve,gguf,quantized]"

FROM python:${PYTHON}

LABEL org.opencontainers.image.title="lazyllm" \
      org.opencontainers.image.licenses="Apache-2.0"

RUN groupadd --gid 10001 lazyllm && useradd --uid 10001 --gid lazyllm --create-home --shell /usr/sbin/nologin lazyllm

COPY --from=build /opt/lazyllm /opt/lazyllm

# Nothing is looked for on a hub: the model is what is mounted.
ENV PATH=/opt/lazyllm/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HF_HUB_OFFLINE=1

USER 10001:10001
WORKDIR /home/lazyllm
VOLUME ["/model"]
EXPOSE 8000

# Loading a model takes a while; until it is loaded, a failure does not count.
HEALTHCHECK --interval=15s --timeout=5s --start-period=10m --retries=3 \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health', timeout=4)"]

# The server finishes running replies when it is asked to stop.
STOPSIGNAL SIGTERM
ENTRYPOINT ["lazyllm", "serve", "--model", "/model", "--host", "0.0.0.0", "--port", "8000"]
