package cgroup

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParse(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name, mounts, groups string
		want                 []Hierarchy
	}{
		{
			name: "version 2",
			mounts: "24 1 8:1 / / rw - ext4 /dev/sda1 rw\n" +
				"30 24 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n",
			groups: "0::/user.slice/session-1.scope\n",
			want:   []Hierarchy{{Version: 2, MountPoint: "/sys/fs/cgroup", Own: "/sys/fs/cgroup/user.slice/session-1.scope"}},
		},
		{
			name: "version 1 with an empty hierarchy of version 2",
			mounts: "31 30 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct\n" +
				"32 30 0:28 / /sys/fs/cgroup/memory rw - cgroup memory rw,memory\n" +
				"33 30 0:29 / /sys/fs/cgroup/systemd rw - cgroup systemd rw,xattr,release_agent=/x,name=systemd\n" +
				"34 30 0:30 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n",
			groups: "9:name=systemd:/\n4:memory:/jobs/1\n1:cpu,cpuacct:/\n0::/\n",
			want: []Hierarchy{
				{Version: 1, MountPoint: "/sys/fs/cgroup/cpu", Options: "cpu,cpuacct", Own: "/sys/fs/cgroup/cpu"},
				{Version: 1, MountPoint: "/sys/fs/cgroup/memory", Options: "memory", Own: "/sys/fs/cgroup/memory/jobs/1"},
				{Version: 1, MountPoint: "/sys/fs/cgroup/systemd", Options: "name=systemd", Own: "/sys/fs/cgroup/systemd"},
				{Version: 2, MountPoint: "/sys/fs/cgroup/unified", Own: "/sys/fs/cgroup/unified"},
			},
		},
		{
			name:   "a container without cgroup namespace: the mount's root is the group",
			mounts: "31 30 0:27 /docker/1 /sys/fs/cgroup/cpu ro - cgroup cgroup rw,cpu\n",
			groups: "1:cpu:/docker/1/a\n",
			want:   []Hierarchy{{Version: 1, MountPoint: "/sys/fs/cgroup/cpu", Options: "cpu", Own: "/sys/fs/cgroup/cpu/a"}},
		},
		{
			name: "a second mount, and one that the group is outside of",
			mounts: "31 30 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n" +
				"32 30 0:27 / /mnt/cpu rw - cgroup cgroup rw,cpu\n" +
				"33 30 0:28 /other /mnt/pids rw - cgroup cgroup rw,pids\n",
			groups: "2:pids:/\n1:cpu:/\n",
			want:   []Hierarchy{{Version: 1, MountPoint: "/sys/fs/cgroup/cpu", Options: "cpu", Own: "/sys/fs/cgroup/cpu"}},
		},
	} {
		if diff := cmp.Diff(tc.want, parse(tc.mounts, tc.groups)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", tc.name, diff)
		}
	}
}
