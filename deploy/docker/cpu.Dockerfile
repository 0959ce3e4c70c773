# Graft on CPUs, for development and for trying the API. From the repository's root:
#   docker build -f deploy/docker/cpu.Dockerfile -t graft:cpu-0.1.0 .
ARG PYTHON_TAG=3.12-slim-bookworm
FROM python:${PYTHON_TAG}

# PyPI's torch for x86_64 is built for CUDA and needs gigabytes of its libraries; this index has the same release without.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG TORCH_VERSION=2.13.0
RUN pip install --no-cache-dir --no-deps --index-url "${TORCH_INDEX}" "torch==${TORCH_VERSION}"

# Before the code, so that a change of the code installs nothing of this again.
COPY deploy/docker/requirements.txt /tmp/requirements.txt
RUN pip install --no-cache-dir --no-deps --requirement /tmp/requirements.txt

COPY pyproject.toml README.md LICENSE /src/
COPY loaders /src/loaders
COPY runtime /src/runtime
# The user has an entry in /etc/passwd, since torch names its cache folder after it.
RUN pip install --no-cache-dir --no-deps --no-build-isolation /src \
    && pip check \
    && graft --version \
    && useradd --uid 10001 --create-home graft

USER 10001:10001
WORKDIR /home/graft
EXPOSE 8033 8035

# No HEALTHCHECK: how long a start may take depends on the model, the image also trains, and Kubernetes ignores it.
# deploy/compose.yaml and the manifests bring their own. Exec form, so that SIGTERM reaches the server and drains it.
ENTRYPOINT ["graft"]
CMD ["serve", "--host", "0.0.0.0"]
