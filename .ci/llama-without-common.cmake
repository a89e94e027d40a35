# Included right after project("llama.cpp"): shadows the cache variable that llama-cpp-python forces ON.
# llama.cpp's "common" library is not used by the Python bindings and is half of the build time.
set(LLAMA_BUILD_COMMON OFF)
