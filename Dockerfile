# eosin in a container: `docker build --target cpu -t eosin:cpu .` or `docker build --target cuda -t eosin:cuda .`
# Run: docker run --rm -v "$PWD":/data eosin:cpu run /data/study.yaml   (add --gpus all with eosin:cuda)
FROM python:3.12-slim AS wheel
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY eosin eosin
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.12-slim AS base
# uv chooses the build of torch; pip would always install the one for CUDA on Linux
RUN pip install --no-cache-dir "uv>=0.7" && useradd --uid 1000 --create-home eosin
COPY --from=wheel /wheels /wheels
COPY release/requirements.txt /wheels/requirements.txt
ENV MPLCONFIGDIR=/tmp/matplotlib PYTHONDONTWRITEBYTECODE=1
WORKDIR /data
ENTRYPOINT ["eosin"]
CMD ["--help"]

# The builds of torch for CPUs have other hashes than those in requirements.txt, so only the versions are kept.
FROM base AS cpu
RUN sed -n 's/^\([A-Za-z0-9._-]*==[^ ;\\]*\).*/\1/p' /wheels/requirements.txt > /tmp/versions.txt \
    && uv pip install --system --no-cache --torch-backend cpu --constraint /tmp/versions.txt "$(ls /wheels/*.whl)[all]" \
    && rm /tmp/versions.txt
USER 1000

# Every file is compared with its hash. The wheels of torch bring CUDA; the host needs only its driver.
FROM base AS cuda
RUN uv pip install --system --no-cache --require-hashes --requirement /wheels/requirements.txt \
    && uv pip install --system --no-cache --no-deps /wheels/*.whl
USER 1000
