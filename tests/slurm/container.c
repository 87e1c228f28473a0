/* Slurm as it is where NVIDIA's pyxis is installed, without containers: srun takes pyxis's options, and each task finds
 * what was asked in its environment, as TEST_CONTAINER_IMAGE, _MOUNTS and _WORKDIR. For tests of launch lines. */
#include <slurm/spank.h>
#include <stdlib.h>
#include <string.h>

SPANK_PLUGIN(container, 1)

static const char *options[] = {"container-image", "container-mounts", "container-workdir"};
static const char *variables[] = {"TEST_CONTAINER_IMAGE", "TEST_CONTAINER_MOUNTS", "TEST_CONTAINER_WORKDIR"};
static char *values[3];

static int keep(int number, const char *value, int remote) {
    free(values[number]);
    values[number] = strdup(value);
    return 0;
}

int slurm_spank_init(spank_t job, int count, char **arguments) {
    for (int i = 0; i < 3; i++) {
        struct spank_option option = {(char *)options[i], "VALUE", "asked of pyxis", 1, i, keep};
        if (spank_option_register(job, &option) != ESPANK_SUCCESS)
            return -1;
    }
    return 0;
}

int slurm_spank_task_init(spank_t job, int count, char **arguments) {
    for (int i = 0; i < 3; i++)
        if (values[i])
            spank_setenv(job, variables[i], values[i], 1);
    return 0;
}
