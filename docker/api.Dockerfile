# API, migration and sweeper, without torch.
#   docker build -f docker/api.Dockerfile -t dfusion-api .
FROM python:3.13.16-slim-trixie AS build
RUN python -m venv /opt/dfusion
ENV PATH=/opt/dfusion/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /opt/dfusion/src
COPY pyproject.toml constraints.txt ./
# only the extra's dependencies: the library's include torch
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['service'], sep='\n')" > service.txt
RUN pip install --constraint constraints.txt --requirement service.txt
COPY . .
RUN pip install --no-deps --editable .
RUN python -m compileall -q .

FROM python:3.13.16-slim-trixie
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="D-Fusion API" \
      org.opencontainers.image.description="REST API, migration and sweeper of D-Fusion" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION"
RUN useradd --system --uid 10001 --home-dir /var/lib/dfusion --create-home --shell /usr/sbin/nologin dfusion
COPY --from=build /opt/dfusion /opt/dfusion
ENV PATH=/opt/dfusion/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 DFUSION_DATA_DIR=/var/lib/dfusion \
    HF_HOME=/var/lib/dfusion/huggingface
USER 10001:10001
WORKDIR /var/lib/dfusion
EXPOSE 8000
CMD ["python", "-m", "api"]
