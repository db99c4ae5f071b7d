/* LD_PRELOAD library for test_power_cut.py: records what a folder contains on disk. At a chosen call, it kills the process
   or sets the process's clock back by an hour.

   After each successful fsync, the flushed content is copied to another folder: the bytes of a file, or the entries of
   a folder. The copy of a file or folder is named by its key, which consists of inode number and time of creation. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <ftw.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static char root[PATH_MAX], durable[PATH_MAX];
static long calls, kill_at, set_back_at;
static volatile time_t set_back_by; /* seconds */

/* Observe the files in `folder` from now on. Kill the process before call number `kill`, and set its clock back before
   call number `set_back`. */
void observe(const char *folder, const char *copies, long kill, long set_back) {
    snprintf(root, sizeof root, "%s", folder);
    snprintf(durable, sizeof durable, "%s", copies);
    calls = 0;
    kill_at = kill;
    set_back_at = set_back;
}

long count_calls(void) { return calls; }

int key_of(const char *path, char *key, int size) {
    struct statx status;
    if (statx(AT_FDCWD, path, AT_SYMLINK_NOFOLLOW, STATX_INO | STATX_BTIME, &status)) return -1;
    snprintf(key, size, "%llu-%lld-%u", (unsigned long long)status.stx_ino, (long long)status.stx_btime.tv_sec,
             status.stx_btime.tv_nsec);
    return 0;
}

static int is_observed(const char *path) { return root[0] && !strncmp(path, root, strlen(root)); }

static int add_hour(const char *path, const struct stat *status, int type, struct FTW *position) {
    struct timespec times[2] = {status->st_atim, status->st_mtim};
    times[1].tv_sec += 3600;
    utimensat(AT_FDCWD, path, times, AT_SYMLINK_NOFOLLOW);
    return 0;
}

/* Move the modification times of all observed files an hour into the future. The kernel's clock is not changed, so these
   files are then an hour newer than files written later, as after the clock has been set back. */
void make_newer(const char *folder) { nftw(folder, add_hour, 16, FTW_PHYS); }

static void before_call(const char *path) {
    if (!is_observed(path)) return;
    long call = __sync_add_and_fetch(&calls, 1);
    if (call == kill_at) kill(getpid(), SIGKILL);
    if (call == set_back_at) {
        make_newer(root);
        set_back_by = 3600;
    }
}

int clock_gettime(clockid_t clock, struct timespec *result) {
    int status = REAL(clock_gettime)(clock, result);
    if (!status && clock == CLOCK_REALTIME) result->tv_sec -= set_back_by;
    return status;
}

time_t time(time_t *result) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (result) *result = now.tv_sec;
    return now.tv_sec;
}

int gettimeofday(struct timeval *restrict result, void *restrict zone) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    result->tv_sec = now.tv_sec;
    result->tv_usec = now.tv_nsec / 1000;
    return 0;
}

static const char *path_of(int descriptor, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = root[0] ? readlink(link, path, PATH_MAX - 1) : -1;
    path[length < 0 ? 0 : length] = 0;
    return path;
}

static void copy_flushed(const char *path) {
    char key[128], copy[2 * PATH_MAX], part[2 * PATH_MAX + 8], buffer[1 << 16];
    if (!is_observed(path) || key_of(path, key, sizeof key)) return;
    snprintf(copy, sizeof copy, "%s/%s", durable, key);
    snprintf(part, sizeof part, "%s.part", copy);
    FILE *target = fopen(part, "w");
    DIR *folder = opendir(path);
    if (folder) {
        struct dirent *entry;
        while ((entry = readdir(folder))) {
            char child[2 * PATH_MAX];
            snprintf(child, sizeof child, "%s/%s", path, entry->d_name);
            if (strcmp(entry->d_name, ".") && strcmp(entry->d_name, "..") && !key_of(child, key, sizeof key))
                fprintf(target, "%s %d %s\n", key, entry->d_type == DT_DIR, entry->d_name);
        }
        closedir(folder);
    } else {
        FILE *source = fopen(path, "r");
        size_t length;
        while (source && (length = fread(buffer, 1, sizeof buffer, source))) fwrite(buffer, 1, length, target);
        if (source) fclose(source);
    }
    fclose(target);
    REAL(rename)(part, copy);
}

#define FLUSH(name)                              \
    int name(int descriptor) {                   \
        char path[PATH_MAX];                     \
        before_call(path_of(descriptor, path));  \
        int result = REAL(name)(descriptor);     \
        if (!result) copy_flushed(path);         \
        return result;                           \
    }
FLUSH(fsync)
FLUSH(fdatasync)

ssize_t write(int descriptor, const void *data, size_t size) {
    char path[PATH_MAX];
    before_call(path_of(descriptor, path));
    return REAL(write)(descriptor, data, size);
}

ssize_t pwrite64(int descriptor, const void *data, size_t size, off64_t offset) {
    char path[PATH_MAX];
    before_call(path_of(descriptor, path));
    return REAL(pwrite64)(descriptor, data, size, offset);
}

int rename(const char *from, const char *to) {
    char path[PATH_MAX];
    before_call(realpath(from, path) ? path : from);
    return REAL(rename)(from, to);
}

int unlink(const char *name) {
    before_call(name);
    return REAL(unlink)(name);
}
