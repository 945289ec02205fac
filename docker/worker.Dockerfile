# Worker, for the CPU by default. For NVIDIA GPUs:
#   docker build -f docker/worker.Dockerfile --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .
FROM python:3.13.16-slim-trixie AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN python -m venv /opt/dfusion
ENV PATH=/opt/dfusion/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /opt/dfusion/src
COPY pyproject.toml constraints.txt README.md LICENSE ./
# torch alone from its index, which has few other packages and not our versions; its dependencies come from PyPI below
RUN pip install --no-deps --constraint constraints.txt --index-url "$TORCH_INDEX" torch torchvision
# an editable install: dependencies are installed before the code is copied
RUN pip install --constraint constraints.txt --editable '.[worker]'
COPY . .
RUN python -m compileall -q .

FROM python:3.13.16-slim-trixie
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="D-Fusion worker" \
      org.opencontainers.image.description="Celery worker of D-Fusion: sampling, fusion, training" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION"
RUN useradd --system --uid 10001 --home-dir /var/lib/dfusion --create-home --shell /usr/sbin/nologin dfusion
COPY --from=build /opt/dfusion /opt/dfusion
ENV PATH=/opt/dfusion/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 DFUSION_DATA_DIR=/var/lib/dfusion \
    HF_HOME=/var/lib/dfusion/huggingface
USER 10001:10001
WORKDIR /var/lib/dfusion
CMD ["celery", "-A", "worker.celery_app", "worker", "-P", "prefork", "-c", "1"]
