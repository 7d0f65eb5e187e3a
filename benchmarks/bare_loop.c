/* A bare loop over ONNX Runtime's C API, for agreement.py.

   OrtApi is a table of functions whose order never changes; those that are needed stand here by their place in
   onnxruntime_c_api.h, so that neither the header nor a library is needed to compile this. */

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <time.h>

typedef struct {
    void *const *(*get_api)(uint32_t version);
    const char *(*get_version)(void);
} Base;

enum {
    GET_ERROR_MESSAGE = 2,
    CREATE_ENV = 3,
    CREATE_SESSION = 7,
    RUN = 9,
    CREATE_SESSION_OPTIONS = 10,
    SET_GRAPH_OPTIMIZATION_LEVEL = 23,
    SET_INTRA_OP_THREADS = 24,
    SET_INTER_OP_THREADS = 25,
    CREATE_TENSOR_WITH_DATA = 49,
    CREATE_CPU_MEMORY_INFO = 69,
};

enum { ERRORS_ONLY = 3, AS_IT_IS = 0, ARENA = 1, DEFAULT_MEMORY = 0, FLOAT = 1, UINT8 = 2, MOST = 256 };

typedef void *Status; /* NULL when all is well */
typedef Status (*Run)(void *session, const void *options, const char *const *input_names, void *const *inputs,
                      size_t input_count, const char *const *output_names, size_t output_count, void **outputs);

static void *const *api;
static void *session, *inputs[MOST], *output;
static const char *input_name, *output_name;
static size_t count;

static int failed(Status status) {
    if (status != NULL)
        fprintf(stderr, "%s\n", ((const char *(*)(Status))api[GET_ERROR_MESSAGE])(status));
    return status != NULL;
}

/* Load a model as it is, and make a tensor of each image and one of the logits, on memory that stays the caller's. */
int bare_open(const Base *(*base)(void), const char *model, int threads, const char *input, const char *result,
              uint8_t *images, size_t image_count, const int64_t *shape, float *logits, int64_t classes) {
    void *env, *options, *memory;
    const int64_t answer[2] = {1, classes};
    size_t bytes = 1;

    for (int axis = 0; axis < 4; axis++)
        bytes *= (size_t)shape[axis];
    api = base()->get_api(1);
    input_name = input, output_name = result, count = image_count < MOST ? image_count : MOST;
    if (failed(((Status(*)(int, const char *, void **))api[CREATE_ENV])(ERRORS_ONLY, "bare", &env)) ||
        failed(((Status(*)(void **))api[CREATE_SESSION_OPTIONS])(&options)) ||
        failed(((Status(*)(void *, int))api[SET_GRAPH_OPTIMIZATION_LEVEL])(options, AS_IT_IS)) ||
        failed(((Status(*)(void *, int))api[SET_INTRA_OP_THREADS])(options, threads)) ||
        failed(((Status(*)(void *, int))api[SET_INTER_OP_THREADS])(options, 1)) ||
        failed(((Status(*)(void *, const char *, void *, void **))api[CREATE_SESSION])(env, model, options, &session)) ||
        failed(((Status(*)(int, int, void **))api[CREATE_CPU_MEMORY_INFO])(ARENA, DEFAULT_MEMORY, &memory)))
        return 1;
    Status (*tensor)(void *, void *, size_t, const int64_t *, size_t, int, void **) =
        (Status(*)(void *, void *, size_t, const int64_t *, size_t, int, void **))api[CREATE_TENSOR_WITH_DATA];
    for (size_t i = 0; i < count; i++)
        if (failed(tensor(memory, images + i * bytes, bytes, shape, 4, UINT8, &inputs[i])))
            return 1;
    return failed(tensor(memory, logits, (size_t)classes * sizeof *logits, answer, 2, FLOAT, &output));
}

static int64_t now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

/* Run one image after another for some nanoseconds, and store how long each takes; return how many, or -1. */
int64_t bare_burst(int64_t duration, int64_t *taken, int64_t room) {
    static size_t turn;
    const Run run = (Run)api[RUN];
    const int64_t until = now() + duration;

    for (int64_t sent = 0; sent < room; sent++) {
        void *const *input = &inputs[turn++ % count];
        const int64_t start = now();
        if (failed(run(session, NULL, &input_name, input, 1, &output_name, 1, &output)))
            return -1;
        const int64_t stop = now();
        taken[sent] = stop - start;
        if (stop >= until)
            return sent + 1;
    }
    return room;
}
