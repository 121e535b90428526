// Preloaded into a server and its engines (LD_PRELOAD): appends to the file RECORDER_TRACE, in one
// order for all processes, what they do to files below RECORDER_ROOT and what they say and hear on
// TCP sockets. Each event is written by a single appending write, after the call it tells of.
//
// Not seen: writes of stdio (fwrite), and memory that is mapped; `Mmap` tells of the latter.

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include <atomic>
#include <string>

namespace {

enum Kind : uint8_t { Open = 1, Write, Truncate, Sync, Rename, Unlink, Mkdir, Mmap, Link, Accepted, Heard, Said };

struct __attribute__((packed)) Event {
    uint8_t kind;
    int32_t pid;
    int32_t fd;       // sockets
    uint64_t inode;   // files
    uint64_t offset;  // Write; size of Truncate; flags of Open
    uint32_t name_bytes, data_bytes;
};

constexpr int kMaxFds = 1 << 16;
std::atomic<bool> files[kMaxFds];  // which are below the root

struct Trace {
    int fd = -1;
    std::string root;
    Trace() {
        const char* file = getenv("RECORDER_TRACE");
        const char* below = getenv("RECORDER_ROOT");
        if (file == nullptr || below == nullptr) return;
        root = std::string(below) + "/";
        int opened = static_cast<int>(syscall(SYS_openat, AT_FDCWD, file, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600));
        if (opened < 0) abort();
        // Out of the way of code that counts on low numbers.
        fd = static_cast<int>(syscall(SYS_fcntl, opened, F_DUPFD_CLOEXEC, 1000));
        syscall(SYS_close, opened);
    }
};

Trace& trace() {
    static Trace* the = new Trace();  // never destroyed: threads write until the very end
    return *the;
}

template <typename F> F real(F, const char* name) { return reinterpret_cast<F>(dlsym(RTLD_NEXT, name)); }
#define REAL(name) static auto const call = real(&::name, #name)

void append(Event event, const std::string& name, const iovec* data, int count, size_t bytes) {
    if (trace().fd < 0) return;
    int saved = errno;
    event.pid = getpid();
    event.name_bytes = static_cast<uint32_t>(name.size());
    event.data_bytes = static_cast<uint32_t>(bytes);
    std::string whole(reinterpret_cast<const char*>(&event), sizeof event);
    whole += name;
    for (int i = 0; i < count && bytes > 0; i++) {
        size_t part = data[i].iov_len < bytes ? data[i].iov_len : bytes;
        whole.append(static_cast<const char*>(data[i].iov_base), part);
        bytes -= part;
    }
    ssize_t written = syscall(SYS_write, trace().fd, whole.data(), whole.size());
    if (written != static_cast<ssize_t>(whole.size())) abort();  // half a trace proves nothing
    errno = saved;
}

bool is_ours(const std::string& path) {
    const std::string& root = trace().root;
    return !root.empty() && (path + "/").compare(0, root.size(), root) == 0;
}

std::string path_of(int fd) {
    char link[64], target[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, target, sizeof target);
    return size < 0 ? "" : std::string(target, static_cast<size_t>(size));
}

std::string absolute(int directory, const char* path) {
    if (path[0] == '/') return path;
    if (directory == AT_FDCWD) {
        char here[PATH_MAX];
        return std::string(getcwd(here, sizeof here) ? here : "") + "/" + path;
    }
    return path_of(directory) + "/" + path;
}

uint64_t inode_of(int fd) {
    struct stat found;
    return syscall(SYS_fstat, fd, &found) == 0 ? found.st_ino : 0;
}

bool is_file(int fd) { return fd >= 0 && fd < kMaxFds && files[fd]; }

void set_file(int fd, bool value) {
    if (fd >= 0 && fd < kMaxFds) files[fd] = value;
}

// Asked every time: libuv closes sockets by a system call of its own, which we do not see.
bool is_tcp(int fd) {
    if (trace().fd < 0 || is_file(fd)) return false;
    int saved = errno, domain = 0;
    socklen_t size = sizeof domain;
    bool is_socket = getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &size) == 0;
    errno = saved;
    return is_socket && (domain == AF_INET || domain == AF_INET6);
}

int opened(int fd, int flags) {
    if (fd < 0) return fd;
    std::string path = path_of(fd);
    set_file(fd, is_ours(path));
    if (is_file(fd))
        append({Open, 0, fd, inode_of(fd), static_cast<uint64_t>(flags), 0, 0}, path, nullptr, 0, 0);
    return fd;
}

// `offset` < 0: the write was at the file's position, which is now behind it.
ssize_t wrote(int fd, const iovec* data, int count, int64_t offset, ssize_t size) {
    if (size <= 0) return size;
    size_t bytes = static_cast<size_t>(size);
    if (is_file(fd)) {
        if (offset < 0) offset = syscall(SYS_lseek, fd, 0, SEEK_CUR) - size;
        append({Write, 0, fd, inode_of(fd), static_cast<uint64_t>(offset), 0, 0}, "", data, count, bytes);
    } else if (is_tcp(fd)) {
        append({Said, 0, fd, 0, 0, 0, 0}, "", data, count, bytes);
    }
    return size;
}

ssize_t heard(int fd, const iovec* data, int count, ssize_t size) {
    if (size > 0 && is_tcp(fd))
        append({Heard, 0, fd, 0, 0, 0, 0}, "", data, count, static_cast<size_t>(size));
    return size;
}

int on_inode(Kind kind, int fd, uint64_t value, int result) {
    if (result == 0 && is_file(fd))
        append({kind, 0, fd, inode_of(fd), value, 0, 0}, "", nullptr, 0, 0);
    return result;
}

int on_path(Kind kind, const std::string& path, int result) {
    if (result != 0 || !is_ours(path)) return result;
    struct stat found = {};
    if (kind == Mkdir || kind == Link) syscall(SYS_newfstatat, AT_FDCWD, path.c_str(), &found, 0);
    append({kind, 0, 0, found.st_ino, 0, 0, 0}, path, nullptr, 0, 0);
    return result;
}

int renamed(const std::string& from, const std::string& to, int result) {
    if (result == 0 && (is_ours(from) || is_ours(to)))
        append({Rename, 0, 0, 0, 0, 0, 0}, from + '\0' + to, nullptr, 0, 0);
    return result;
}

// What the kernel copied from file to file is read back.
ssize_t copied(int fd, int64_t offset, ssize_t size) {
    if (size > 0 && is_file(fd)) {
        if (offset < 0) offset = syscall(SYS_lseek, fd, 0, SEEK_CUR) - size;
        std::string link = "/proc/self/fd/" + std::to_string(fd), data(static_cast<size_t>(size), 0);
        int again = static_cast<int>(syscall(SYS_openat, AT_FDCWD, link.c_str(), O_RDONLY | O_CLOEXEC, 0));
        ssize_t read = syscall(SYS_pread64, again, data.data(), data.size(), offset);
        syscall(SYS_close, again);
        if (read != size) abort();
        iovec whole = {data.data(), data.size()};
        return wrote(fd, &whole, 1, offset, size);
    }
    return size;
}

[[noreturn]] void unseen(const char* what) {
    fprintf(stderr, "the recorder does not follow %s\n", what);
    abort();
}

mode_t mode_of(int flags, va_list rest) { return flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; }

}  // namespace

#define OPEN(name)                                                  \
    int name(const char* path, int flags, ...) {                    \
        va_list rest;                                               \
        va_start(rest, flags);                                      \
        mode_t mode = mode_of(flags, rest);                         \
        va_end(rest);                                               \
        REAL(name);                                                 \
        return opened(call(path, flags, mode), flags);              \
    }
#define OPENAT(name)                                                \
    int name(int directory, const char* path, int flags, ...) {     \
        va_list rest;                                               \
        va_start(rest, flags);                                      \
        mode_t mode = mode_of(flags, rest);                         \
        va_end(rest);                                               \
        REAL(name);                                                 \
        return opened(call(directory, path, flags, mode), flags);   \
    }
#define PWRITE(name)                                                          \
    ssize_t name(int fd, const void* data, size_t size, off_t offset) {       \
        REAL(name);                                                           \
        iovec whole = {const_cast<void*>(data), size};                        \
        return wrote(fd, &whole, 1, offset, call(fd, data, size, offset));    \
    }
#define PWRITEV(name)                                                         \
    ssize_t name(int fd, const iovec* data, int count, off_t offset) {        \
        REAL(name);                                                           \
        return wrote(fd, data, count, offset, call(fd, data, count, offset)); \
    }
#define FTRUNCATE(name)                                                       \
    int name(int fd, off_t size) noexcept {                                   \
        REAL(name);                                                           \
        return on_inode(Truncate, fd, static_cast<uint64_t>(size), call(fd, size)); \
    }
#define SYNC(name)                                                  \
    int name(int fd) {                                              \
        REAL(name);                                                 \
        return on_inode(Sync, fd, 0, call(fd));                     \
    }
#define SENDFILE(name)                                                                \
    ssize_t name(int to, int from, off_t* offset, size_t size) noexcept {             \
        REAL(name);                                                                   \
        return copied(to, -1, call(to, from, offset, size));                          \
    }
#define MMAP(name)                                                                            \
    void* name(void* address, size_t size, int access, int flags, int fd, off_t offset) noexcept { \
        REAL(name);                                                                           \
        void* mapped = call(address, size, access, flags, fd, offset);                        \
        if (fd >= 0 && (flags & MAP_SHARED) && (access & PROT_WRITE) && mapped != MAP_FAILED) \
            on_inode(Mmap, fd, 0, 0);                                                         \
        return mapped;                                                                        \
    }

extern "C" {

OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)
PWRITE(pwrite)
PWRITE(pwrite64)
PWRITEV(pwritev)
PWRITEV(pwritev64)
FTRUNCATE(ftruncate)
FTRUNCATE(ftruncate64)
SYNC(fsync)
SYNC(fdatasync)
SENDFILE(sendfile)
SENDFILE(sendfile64)
MMAP(mmap)
MMAP(mmap64)

ssize_t write(int fd, const void* data, size_t size) {
    REAL(write);
    iovec whole = {const_cast<void*>(data), size};
    return wrote(fd, &whole, 1, -1, call(fd, data, size));
}

ssize_t writev(int fd, const iovec* data, int count) {
    REAL(writev);
    return wrote(fd, data, count, -1, call(fd, data, count));
}

ssize_t send(int fd, const void* data, size_t size, int flags) {
    REAL(send);
    iovec whole = {const_cast<void*>(data), size};
    return wrote(fd, &whole, 1, -1, call(fd, data, size, flags));
}

ssize_t sendmsg(int fd, const msghdr* message, int flags) {
    REAL(sendmsg);
    return wrote(fd, message->msg_iov, static_cast<int>(message->msg_iovlen), -1, call(fd, message, flags));
}

ssize_t read(int fd, void* data, size_t size) {
    REAL(read);
    ssize_t got = call(fd, data, size);
    iovec whole = {data, size};
    return heard(fd, &whole, 1, got);
}

ssize_t recv(int fd, void* data, size_t size, int flags) {
    REAL(recv);
    ssize_t got = call(fd, data, size, flags);
    iovec whole = {data, size};
    return heard(fd, &whole, 1, got);
}

ssize_t recvmsg(int fd, msghdr* message, int flags) {
    REAL(recvmsg);
    return heard(fd, message->msg_iov, static_cast<int>(message->msg_iovlen), call(fd, message, flags));
}

ssize_t copy_file_range(int from, off64_t* from_offset, int to, off64_t* to_offset, size_t size, unsigned flags) {
    REAL(copy_file_range);
    int64_t offset = to_offset == nullptr ? -1 : *to_offset;
    return copied(to, offset, call(from, from_offset, to, to_offset, size, flags));
}

int accept4(int listener, sockaddr* address, socklen_t* size, int flags) {
    REAL(accept4);
    int fd = call(listener, address, size, flags);
    if (is_tcp(fd)) append({Accepted, 0, fd, 0, 0, 0, 0}, "", nullptr, 0, 0);
    return fd;
}

int close(int fd) {
    REAL(close);
    if (fd == trace().fd) return 0;  // somebody closes all that is open
    set_file(fd, false);
    return call(fd);
}

int rename(const char* from, const char* to) noexcept {
    REAL(rename);
    std::string source = absolute(AT_FDCWD, from), target = absolute(AT_FDCWD, to);
    return renamed(source, target, call(from, to));
}

int renameat(int from_directory, const char* from, int to_directory, const char* to) noexcept {
    REAL(renameat);
    std::string source = absolute(from_directory, from), target = absolute(to_directory, to);
    return renamed(source, target, call(from_directory, from, to_directory, to));
}

int link(const char* from, const char* to) noexcept {
    REAL(link);
    std::string target = absolute(AT_FDCWD, to);
    return on_path(Link, target, call(from, to));
}

int linkat(int from_directory, const char* from, int to_directory, const char* to, int flags) noexcept {
    REAL(linkat);
    std::string target = absolute(to_directory, to);
    return on_path(Link, target, call(from_directory, from, to_directory, to, flags));
}

int unlink(const char* path) noexcept {
    REAL(unlink);
    std::string whole = absolute(AT_FDCWD, path);
    return on_path(Unlink, whole, call(path));
}

int unlinkat(int directory, const char* path, int flags) noexcept {
    REAL(unlinkat);
    std::string whole = absolute(directory, path);
    return on_path(Unlink, whole, call(directory, path, flags));
}

int rmdir(const char* path) noexcept {
    REAL(rmdir);
    std::string whole = absolute(AT_FDCWD, path);
    return on_path(Unlink, whole, call(path));
}

int mkdir(const char* path, mode_t mode) noexcept {
    REAL(mkdir);
    std::string whole = absolute(AT_FDCWD, path);
    return on_path(Mkdir, whole, call(path, mode));
}

int mkdirat(int directory, const char* path, mode_t mode) noexcept {
    REAL(mkdirat);
    std::string whole = absolute(directory, path);
    return on_path(Mkdir, whole, call(directory, path, mode));
}

// What cannot be followed must not happen unseen.
int symlink(const char* target, const char* path) noexcept {
    REAL(symlink);
    if (is_ours(absolute(AT_FDCWD, path))) unseen("symlink");
    return call(target, path);
}

int truncate(const char* path, off_t size) noexcept {
    REAL(truncate);
    if (is_ours(absolute(AT_FDCWD, path))) unseen("truncate");
    return call(path, size);
}

}  // extern "C"
