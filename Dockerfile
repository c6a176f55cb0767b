# starflow2_jax in a container, for CPUs or NVIDIA GPUs.
#
#   docker build -t starflow2_jax .
#   docker build -t starflow2_jax:cuda --build-arg EXTRAS=cuda,serve .
#
# EXTRAS   extras of the package, joined by commas. cuda brings the CUDA libraries as wheels; the
#          host needs NVIDIA's driver and container toolkit.
# PYTHON   release of Python
ARG PYTHON=3.12
FROM python:${PYTHON}-slim AS build

ARG EXTRAS="serve"
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH

WORKDIR /src
# The dependencies are a layer of their own, which a change of the code does not rebuild.
COPY pyproject.toml ./
COPY launch/requirements.py launch/
RUN python launch/requirements.py "${EXTRAS}" > requirements.txt \
  && pip install -r requirements.txt
COPY setup.py README.md LICENSE ./
COPY starflow2_jax starflow2_jax
COPY experiments experiments
RUN pip install --no-deps .

FROM python:${PYTHON}-slim
COPY --from=build /opt/venv /opt/venv
# What the launchers of clusters expect, such as launch/gke.yaml.
COPY experiments /starflow2_jax/experiments
COPY launch /starflow2_jax/launch
# Compiled programs and models of the Hugging Face Hub are kept in /home/starflow2/.cache.
RUN useradd --create-home --uid 1000 starflow2 \
  && mkdir -p /work /home/starflow2/.cache \
  && chown -R starflow2 /work /home/starflow2/.cache
USER 1000
ENV PATH=/opt/venv/bin:$PATH NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /work
ENTRYPOINT ["starflow2"]
CMD ["--help"]
