# Build: docker compose build. torch comes as a CPU build from TORCH_INDEX; where that cannot be reached,
# WHEELS_IMAGE names an image with the torch wheel in its root.
ARG WHEELS_IMAGE=scratch
FROM ${WHEELS_IMAGE} AS wheels

FROM python:3.11-slim AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG CYCLONEDX_BOM=cyclonedx-bom==7.5.0
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1
# pip works from outside, so that it need not be cleared away.
RUN python3 -m venv --without-pip /opt/venv && python3 -m venv /opt/tools \
    && /opt/tools/bin/pip install --quiet ${CYCLONEDX_BOM}
COPY constraints.txt /src/
RUN --mount=type=bind,from=wheels,target=/wheels \
    /opt/tools/bin/pip --python /opt/venv install --quiet --no-compile --constraint /src/constraints.txt \
        --retries 1 --timeout 10 --find-links /wheels --extra-index-url ${TORCH_INDEX} torch \
    # What only builds of extensions and torch's own tests need.
    && for part in include share test; do rm -rf /opt/venv/lib/python3*/site-packages/torch/$part; done \
    && find /opt/venv -name '*.a' -delete \
    && find /opt/venv/lib/python3*/site-packages/torch/bin -type f ! -name torch_shm_manager -delete
COPY pyproject.toml README.md LICENSE /src/
COPY clients /src/clients
RUN /opt/tools/bin/pip --python /opt/venv install --quiet --no-compile --constraint /src/constraints.txt \
        '/src[service,tracing]' \
    # torch asks for it, and has no use for it but to build extensions.
    && /opt/tools/bin/pip --python /opt/venv uninstall --quiet --yes setuptools \
    && /opt/tools/bin/cyclonedx-py environment /opt/venv/bin/python --pyproject /src/pyproject.toml \
        --output-reproducible --output-format JSON --output-file /opt/sbom.cdx.json
WORKDIR /app
COPY models models
COPY service service
# What is imported is there compiled, for a container that may write nothing would compile it at each start. The rest of
# torch is never imported.
RUN PYTHONDONTWRITEBYTECODE='' /opt/venv/bin/python -c \
        'import service.app, service.healthcheck, service.lane, service.supervisor, service.worker' \
    && PYTHONDONTWRITEBYTECODE='' /opt/venv/bin/python -m compileall -q service

FROM python:3.11-slim
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="rnnserve" \
      org.opencontainers.image.description="A gRPC server for trained recurrent neural networks" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}"
# Nothing is installed here any more.
RUN rm -rf /usr/lib/python3/dist-packages /usr/local/lib/python3*/site-packages/* /usr/lib/python3*/ensurepip \
        /usr/local/lib/python3*/ensurepip /usr/bin/pip* /usr/local/bin/pip* \
    && groupadd --system --gid 10001 rnnserve \
    && useradd --system --uid 10001 --gid 10001 --home-dir /app rnnserve \
    && install --directory --owner rnnserve --group rnnserve /var/lib/rnnserve /var/spool/rnnserve
COPY --from=build /opt/venv /opt/venv
COPY --from=build /opt/sbom.cdx.json /usr/share/doc/rnnserve/sbom.cdx.json
COPY LICENSE THIRD_PARTY_NOTICES.md /usr/share/doc/rnnserve/
WORKDIR /app
COPY --from=build /app /app
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 RNNSERVE_HOST=0.0.0.0 \
    RNNSERVE_STATE_DIR=/var/lib/rnnserve RNNSERVE_SPILL_DIR=/var/spool/rnnserve
# On a disk, also where the root file system is read-only. /tmp must be writable, too.
VOLUME ["/var/lib/rnnserve", "/var/spool/rnnserve"]
USER 10001:10001
EXPOSE 50051 9464
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 CMD ["python", "-m", "service.healthcheck"]
CMD ["python", "-m", "service"]
