package check

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"sigs.k8s.io/yaml"
)

// manifests are the objects of services.yaml and of one of the others.
type manifests struct {
	nodes, clients corev1.Service
	budget         policyv1.PodDisruptionBudget
	set            appsv1.StatefulSet
	container      corev1.Container // the only one of the set
}

// readObjects reads the objects of a file, each into one of the same order. A field that
// Kubernetes does not have, or that stands there twice, is an error.
func readObjects(t *testing.T, file string, objects ...any) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("..", "kubernetes", file))
	if err != nil {
		t.Fatal(err)
	}
	documents := bytes.Split(text, []byte("\n---\n"))
	if len(documents) != len(objects) {
		t.Fatalf("%s has %d objects, want %d", file, len(documents), len(objects))
	}
	for i, document := range documents {
		if err := yaml.UnmarshalStrict(document, objects[i]); err != nil {
			t.Fatalf("%s, object %d: %v", file, i+1, err)
		}
	}
}

// eachManifest runs a test with each StatefulSet.
func eachManifest(t *testing.T, test func(t *testing.T, m *manifests)) {
	for _, file := range []string{"memory.yaml", "durable.yaml"} {
		t.Run(file, func(t *testing.T) {
			m := &manifests{}
			readObjects(t, "services.yaml", &m.nodes, &m.clients, &m.budget)
			readObjects(t, file, &m.set)
			containers := m.set.Spec.Template.Spec.Containers
			if len(containers) != 1 {
				t.Fatalf("it has %d containers", len(containers))
			}
			m.container = containers[0]
			test(t, m)
		})
	}
}

// args are the arguments of the pod with a number, as the kubelet expands them.
func (m *manifests) args(ordinal int) (args, env []string) {
	values := map[string]string{}
	for _, e := range m.container.Env {
		switch e.ValueFrom.FieldRef.FieldPath {
		case "metadata.labels['apps.kubernetes.io/pod-index']":
			values[e.Name] = fmt.Sprint(ordinal)
		case "metadata.name":
			values[e.Name] = fmt.Sprintf("%s-%d", m.set.Name, ordinal)
		}
		env = append(env, e.Name+"="+values[e.Name])
	}
	for _, arg := range m.container.Args {
		for name, value := range values {
			arg = strings.ReplaceAll(arg, "$("+name+")", value)
		}
		args = append(args, arg)
	}
	return args, env
}

// flag is the value of a flag in the arguments of the first pod.
func (m *manifests) flag(t *testing.T, name string) string {
	t.Helper()
	args, _ := m.args(1)
	for _, arg := range args {
		if value, ok := strings.CutPrefix(arg, "--"+name+"="); ok {
			return value
		}
	}
	t.Fatalf("there is no --%s", name)
	return ""
}

// TestManifestArguments has the program itself check the settings of each pod: what
// it misses in the end is the certificate, for nothing is mounted here.
func TestManifestArguments(t *testing.T) {
	program := buildProgram(t)
	eachManifest(t, func(t *testing.T, m *manifests) {
		start := int(m.set.Spec.Ordinals.Start)
		if start < 1 {
			t.Fatal("the first pod's number is 0, which no node can have")
		}
		for ordinal := start; ordinal < start+int(*m.set.Spec.Replicas); ordinal++ {
			args, env := m.args(ordinal)
			cmd := exec.Command(program, args...)
			cmd.Env = env
			out, err := cmd.CombinedOutput()
			file := fmt.Sprintf("/pki/node%d.pem", ordinal)
			if err == nil || cmd.ProcessState.ExitCode() == 2 || !bytes.Contains(out, []byte(file)) {
				t.Errorf("pod %d: %v: want it to miss %s:\n%s", ordinal, err, file, out)
			}
			list := m.flag(t, "initial-cluster")
			if n := strings.Count(list, "="); n != int(*m.set.Spec.Replicas) {
				t.Errorf("the list has %d nodes", n)
			}
		}
	})
}

// TestManifestPorts looks that flags, ports, services, probes and volumes name the same.
func TestManifestPorts(t *testing.T) {
	eachManifest(t, func(t *testing.T, m *manifests) {
		ports := map[string]int32{}
		for _, p := range m.container.Ports {
			ports[p.Name] = p.ContainerPort
		}
		for flag, port := range map[string]string{"addr": "grpc", "http-addr": "http"} {
			if want := fmt.Sprintf(":%d", ports[port]); m.flag(t, flag) != want {
				t.Errorf("--%s is not %s", flag, want)
			}
		}
		for _, service := range []corev1.Service{m.nodes, m.clients} {
			for _, p := range service.Spec.Ports {
				if ports[p.TargetPort.StrVal] != p.Port {
					t.Errorf("service %s: port %s", service.Name, p.Name)
				}
			}
			if fmt.Sprint(service.Spec.Selector) != fmt.Sprint(m.set.Spec.Template.Labels) {
				t.Errorf("service %s selects %v", service.Name, service.Spec.Selector)
			}
		}
		if m.set.Spec.ServiceName != m.nodes.Name {
			t.Errorf("the names of pods are those of %s", m.set.Spec.ServiceName)
		}
		if fmt.Sprint(m.set.Spec.Selector.MatchLabels) != fmt.Sprint(m.budget.Spec.Selector.MatchLabels) {
			t.Error("the budget is for other pods")
		}
		wantAddress := fmt.Sprintf("%s-1.%s:%d", m.set.Name, m.nodes.Name, ports["grpc"])
		if m.flag(t, "advertise") != wantAddress {
			t.Errorf("--advertise is not %s", wantAddress)
		}
		mounted := map[string]string{}
		for _, v := range m.container.VolumeMounts {
			mounted[v.Name] = v.MountPath
		}
		if filepath.Dir(m.flag(t, "cert-file")) != mounted["pki"] {
			t.Errorf("the certificates are at %s", mounted["pki"])
		}
		claims := m.set.Spec.VolumeClaimTemplates
		if len(claims) > 0 && filepath.Dir(m.flag(t, "data-dir")) != mounted[claims[0].Name] {
			t.Errorf("the volume is at %s", mounted[claims[0].Name])
		}
	})
}

// TestManifestRules looks at what a cluster cannot do without.
func TestManifestRules(t *testing.T) {
	eachManifest(t, func(t *testing.T, m *manifests) {
		spec, pod := m.set.Spec, m.set.Spec.Template.Spec
		isHeadless := m.nodes.Spec.ClusterIP == corev1.ClusterIPNone
		one := intstr.FromInt32(1)
		for what, holds := range map[string]bool{
			"pods start at once":                          spec.PodManagementPolicy == appsv1.ParallelPodManagement,
			"nodes find each other before they are ready": isHeadless && m.nodes.Spec.PublishNotReadyAddresses,
			"clients find only nodes that are ready":      !m.clients.Spec.PublishNotReadyAddresses,
			"one pod goes at a time":                      m.budget.Spec.MaxUnavailable != nil && *m.budget.Spec.MaxUnavailable == one,
			"no variables of services":                    !*pod.EnableServiceLinks,
			"no root":                                     *pod.SecurityContext.RunAsNonRoot,
			"no writes beside volumes":                    *m.container.SecurityContext.ReadOnlyRootFilesystem,
			"no privileges":                               !*m.container.SecurityContext.AllowPrivilegeEscalation,
			"a limit of memory that is there":             m.container.Resources.Limits.Memory().Cmp(*m.container.Resources.Requests.Memory()) == 0,
			"never two on one machine":                    len(pod.Affinity.PodAntiAffinity.RequiredDuringSchedulingIgnoredDuringExecution) == 1,
		} {
			if !holds {
				t.Errorf("it does not hold: %s", what)
			}
		}
		grace := time.Duration(*pod.TerminationGracePeriodSeconds) * time.Second
		preStop := time.Duration(m.container.Lifecycle.PreStop.Sleep.Seconds) * time.Second
		if grace < preStop+stopTime {
			t.Errorf("it is killed after %v: preStop takes %v, and a node %v", grace, preStop, stopTime)
		}
		if m.container.LivenessProbe.HTTPGet.Path != "/livez" || m.container.StartupProbe.HTTPGet.Path != "/livez" {
			t.Error("a restart must depend on /livez alone")
		}
		if m.container.ReadinessProbe.HTTPGet.Path != "/readyz" {
			t.Error("clients are to come once /readyz says so")
		}
		for _, probe := range []*corev1.Probe{m.container.StartupProbe, m.container.LivenessProbe, m.container.ReadinessProbe} {
			if probe.HTTPGet.Port.StrVal != "http" || probe.HTTPGet.Scheme != corev1.URISchemeHTTPS {
				t.Errorf("a probe asks %v", probe.HTTPGet)
			}
		}
	})
}

// TestManifestsAreAlike looks that the two differ in the volume alone, and in what they say of it.
func TestManifestsAreAlike(t *testing.T) {
	var sets [2]appsv1.StatefulSet
	readObjects(t, "memory.yaml", &sets[0])
	readObjects(t, "durable.yaml", &sets[1])
	durable := &sets[1].Spec
	durable.VolumeClaimTemplates, durable.PersistentVolumeClaimRetentionPolicy = nil, nil
	container := &durable.Template.Spec.Containers[0]
	container.Args = slices.DeleteFunc(container.Args, func(s string) bool { return strings.HasPrefix(s, "--data-dir=") })
	container.VolumeMounts = slices.DeleteFunc(container.VolumeMounts, func(v corev1.VolumeMount) bool { return v.Name == "data" })
	var texts [2]string
	for i, set := range sets {
		text, err := yaml.Marshal(set)
		if err != nil {
			t.Fatal(err)
		}
		texts[i] = string(text)
	}
	if texts[0] != texts[1] {
		t.Errorf("in memory:\n%s\nwith volumes:\n%s", texts[0], texts[1])
	}
}

// TestImageAgrees looks that Dockerfile and manifests have the same user, ports and directories.
func TestImageAgrees(t *testing.T) {
	dockerfile := readFile(t, "../Dockerfile")
	eachManifest(t, func(t *testing.T, m *manifests) {
		user := m.set.Spec.Template.Spec.SecurityContext
		wantPart(t, dockerfile, fmt.Sprintf("\nUSER %d:%d\n", *user.RunAsUser, *user.RunAsGroup))
		exposed := regexp.MustCompile(`(?m)^EXPOSE (.*)$`).FindStringSubmatch(dockerfile)
		for _, flag := range []string{"addr", "http-addr"} {
			_, port, err := net.SplitHostPort(m.flag(t, flag))
			if err != nil || !slices.Contains(strings.Fields(exposed[1]), port) {
				t.Errorf("--%s is not among the ports of the image: %v", flag, err)
			}
		}
	})
}
