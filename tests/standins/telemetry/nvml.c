/* Stands in for NVIDIA's libnvidia-ml.so.1: two GPUs, with the refusals of nvml.h.

   NVML_STANDIN_INIT         what nvmlInit_v2 returns (9: the driver is not loaded)
   NVML_STANDIN_UNSUPPORTED  names of functions that these GPUs do not support
   NVML_STANDIN_REASONS      nvmlClocksEventReasons that are active */

#include <stdlib.h>
#include <string.h>

enum { SUCCESS, UNINITIALIZED, INVALID_ARGUMENT, NOT_SUPPORTED, NO_PERMISSION, DRIVER_NOT_LOADED = 9 };
typedef struct { unsigned index; unsigned long long spent; } Device;
typedef struct { unsigned long long total, free, used; } Memory;
typedef struct { unsigned gpu, memory; } Utilization;

static int initialized;
static Device devices[2] = {{0, 0}, {1, 0}};

static int check(const char *function, const Device *device) {
    const char *unsupported = getenv("NVML_STANDIN_UNSUPPORTED");
    if (!initialized) return UNINITIALIZED;
    if (device != &devices[0] && device != &devices[1]) return INVALID_ARGUMENT;
    return unsupported && strstr(unsupported, function) ? NOT_SUPPORTED : SUCCESS;
}

#define ANSWER(result, value) \
    do { \
        int code = check(__func__, device); \
        if (code == SUCCESS) *(result) = (value); \
        return code; \
    } while (0)

const char *nvmlErrorString(int code) {
    switch (code) {
    case UNINITIALIZED: return "Uninitialized";
    case INVALID_ARGUMENT: return "Invalid Argument";
    case NOT_SUPPORTED: return "Not Supported";
    case NO_PERMISSION: return "Insufficient Permissions";
    case DRIVER_NOT_LOADED: return "Driver Not Loaded";
    default: return "Unknown Error";
    }
}

int nvmlInit_v2(void) {
    const char *code = getenv("NVML_STANDIN_INIT");
    initialized = !code;
    return code ? atoi(code) : SUCCESS;
}

int nvmlDeviceGetCount_v2(unsigned *count) {
    if (!initialized) return UNINITIALIZED;
    *count = 2;
    return SUCCESS;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, Device **device) {
    if (!initialized) return UNINITIALIZED;
    if (index > 1) return INVALID_ARGUMENT;
    *device = &devices[index];
    return SUCCESS;
}

int nvmlDeviceGetClockInfo(Device *device, int type, unsigned *mhz) {
    if (type < 0 || type > 3) return INVALID_ARGUMENT;
    ANSWER(mhz, type == 1 ? 1980 : type == 2 ? 3201 : 1);
}
int nvmlDeviceGetTemperature(Device *device, int sensor, unsigned *degrees) {
    if (sensor != 0) return INVALID_ARGUMENT;
    ANSWER(degrees, 41 + device->index);
}
int nvmlDeviceGetPowerUsage(Device *device, unsigned *milliwatts) { ANSWER(milliwatts, 123456); }
int nvmlDeviceGetTotalEnergyConsumption(Device *device, unsigned long long *millijoules) {
    ANSWER(millijoules, 5000000000ULL + (device->spent += 12345));
}
int nvmlDeviceGetMemoryInfo(Device *device, Memory *memory) {
    ANSWER(memory, ((Memory){150000000000ULL, 149000000000ULL, 1000000000ULL}));
}
int nvmlDeviceGetUtilizationRates(Device *device, Utilization *rates) { ANSWER(rates, ((Utilization){87, 12})); }
int nvmlDeviceGetCurrentClocksThrottleReasons(Device *device, unsigned long long *reasons) {
    const char *active = getenv("NVML_STANDIN_REASONS");
    ANSWER(reasons, active ? strtoull(active, NULL, 0) : 0);
}
int nvmlDeviceGetFanSpeed(Device *device, unsigned *percent) { ANSWER(percent, 30); }
