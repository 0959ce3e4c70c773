# Graft on Ascend NPUs. From the repository's root, for A2; for A3 add --build-arg CANN_TAG=9.1.0-a3-ubuntu22.04-py3.12:
#   docker build -f deploy/docker/ascend.Dockerfile -t graft:ascend-a2-0.1.0 .
ARG CANN_TAG=9.1.0-910b-ubuntu22.04-py3.12
FROM ascend/cann:${CANN_TAG}

# torch and torch_npu must be the same release (the npu extra of pyproject.toml). torch comes from the CPU index: PyPI's
# build for x86_64 needs CUDA's libraries, and torch_npu brings the NPU's part itself.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG TORCH_VERSION=2.13.0
RUN pip install --no-cache-dir --no-deps --index-url "${TORCH_INDEX}" "torch==${TORCH_VERSION}" \
    && pip install --no-cache-dir --no-deps "torch_npu==${TORCH_VERSION}"

# Before the code, so that a change of the code installs nothing of this again.
COPY deploy/docker/requirements.txt /tmp/requirements.txt
RUN pip install --no-cache-dir --no-deps --requirement /tmp/requirements.txt

# The device nodes belong to the group HwHiAiUser of the host; its number is often, not always, 1000: compare with
# `ls -ln /dev/davinci0` there. A process outside that group cannot open a device.
ARG ASCEND_GID=1000
RUN if ! getent group "${ASCEND_GID}"; then groupadd --gid "${ASCEND_GID}" HwHiAiUser; fi \
    && groupadd --gid 10001 graft \
    && useradd --uid 10001 --gid 10001 --groups "${ASCEND_GID}" --create-home graft

COPY deploy/docker/ascend-entrypoint.sh /usr/local/bin/ascend-entrypoint
RUN chmod 0755 /usr/local/bin/ascend-entrypoint

COPY pyproject.toml README.md LICENSE /src/
COPY loaders /src/loaders
COPY runtime /src/runtime
# `graft --version` does not import torch_npu, which needs the host's driver and so cannot be tried in a build. There is
# no `pip check`: the base image has packages of its own.
RUN pip install --no-cache-dir --no-deps --no-build-isolation /src && graft --version

USER 10001:10001
WORKDIR /home/graft
EXPOSE 8033 8035

# No HEALTHCHECK: a start may take many minutes, depending on the model; the image also trains; Kubernetes ignores it.
ENTRYPOINT ["/usr/local/bin/ascend-entrypoint"]
CMD ["serve", "--host", "0.0.0.0", "--device", "npu"]
