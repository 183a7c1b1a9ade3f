# Build: docker compose build. torch comes as a CPU build from TORCH_INDEX; where that cannot be reached,
# WHEELS_IMAGE names an image with the torch wheel in its root.
ARG WHEELS_IMAGE=scratch
FROM ${WHEELS_IMAGE} AS wheels

FROM python:3.11-slim AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
COPY constraints.txt /src/
RUN --mount=type=bind,from=wheels,target=/wheels \
    pip install --quiet --constraint /src/constraints.txt --retries 1 --timeout 10 \
        --find-links /wheels --extra-index-url ${TORCH_INDEX} torch
COPY pyproject.toml README.md LICENSE /src/
COPY clients /src/clients
RUN pip install --quiet --constraint /src/constraints.txt '/src[service]'

FROM python:3.11-slim
RUN useradd --system --uid 10001 --home-dir /app rnnserve \
    && install --directory --owner rnnserve /var/lib/rnnserve /var/spool/rnnserve
COPY --from=build /opt/venv /opt/venv
WORKDIR /app
COPY models models
COPY service service
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 RNNSERVE_HOST=0.0.0.0 \
    RNNSERVE_STATE_DIR=/var/lib/rnnserve RNNSERVE_SPILL_DIR=/var/spool/rnnserve
USER rnnserve
EXPOSE 50051 9464
HEALTHCHECK --interval=5s --timeout=5s --start-period=60s --retries=3 CMD ["python", "-m", "service.healthcheck"]
CMD ["python", "-m", "service"]
