# The two commands in a container: docker build -t patchsae . && docker run --rm -v "$PWD/_build:/work/_build" patchsae
FROM python:3.11-slim-bookworm
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends make git chromium \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /work
# The environment first: it is made anew only if a version changes. The package is installed in place.
COPY Makefile pyproject.toml requirements.lock README.md LICENSE ./
COPY lib lib
RUN make .venv/.installed
COPY . .
CMD ["make", "book"]
