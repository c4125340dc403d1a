package apiserver

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"mime"
	"net/http"
	"strconv"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
)

// encoding is a wire format. Implementations assemble lists and events from the cached encodings
// of objects.
type encoding interface {
	contentType() string
	// streamType returns the content type of a watch.
	streamType() string
	object(v *Version) ([]byte, error)
	list(r resource, number uint64, items []*Version) ([]byte, error)
	// appendEvent appends one event of a watch.
	appendEvent(to *bytes.Buffer, event watch.EventType, v *Version) error
	status(s *metav1.Status) ([]byte, error)
}

const (
	typeJSON     = "application/json"
	typeProtobuf = "application/vnd.kubernetes.protobuf"
)

// negotiate returns the first supported encoding of the Accept header. Clients list encodings in
// order of preference.
func negotiate(r *http.Request) (encoding, error) {
	header := strings.Join(r.Header.Values("Accept"), ",")
	for clause := range strings.SplitSeq(header, ",") {
		if clause = strings.TrimSpace(clause); clause == "" {
			continue
		}
		media, params, err := mime.ParseMediaType(clause)
		if err != nil || params["as"] != "" { // tables and metadata are not supported
			continue
		}
		switch media {
		case typeProtobuf:
			return protobufEncoding{}, nil
		case typeJSON, "application/*", "*/*":
			return jsonEncoding{}, nil
		}
	}
	if header == "" {
		return jsonEncoding{}, nil
	}
	return nil, fmt.Errorf("none of the media types %s is supported: use %s or %s", header, typeProtobuf, typeJSON)
}

type jsonEncoding struct{}

func (jsonEncoding) contentType() string               { return typeJSON }
func (jsonEncoding) streamType() string                { return typeJSON }
func (jsonEncoding) object(v *Version) ([]byte, error) { return v.json() }

func (jsonEncoding) list(r resource, number uint64, items []*Version) ([]byte, error) {
	meta := r.typeMeta()
	var b bytes.Buffer
	fmt.Fprintf(&b, `{"kind":"%sList","apiVersion":%q,"metadata":{"resourceVersion":"%d"},"items":[`, meta.Kind, meta.APIVersion, number)
	for i, v := range items {
		data, err := v.json()
		if err != nil {
			return nil, err
		}
		if i > 0 {
			b.WriteByte(',')
		}
		b.Write(data)
	}
	b.WriteString("]}")
	return b.Bytes(), nil
}

func (jsonEncoding) appendEvent(to *bytes.Buffer, event watch.EventType, v *Version) error {
	data, err := v.json()
	if err != nil {
		return err
	}
	fmt.Fprintf(to, `{"type":%q,"object":`, event)
	to.Write(data)
	to.WriteString("}\n")
	return nil
}

func (jsonEncoding) status(s *metav1.Status) ([]byte, error) { return json.Marshal(s) }

// protobufEncoding is Kubernetes' protobuf format: four magic bytes followed by a message
// runtime.Unknown, which contains the message of the object. A watch is a sequence of messages
// metav1.WatchEvent, each after its length, whose objects have this format.
type protobufEncoding struct{}

// Tags of fields of list messages: the field number and the wire type 2,
// "length-delimited".
const (
	listMetadata = 1<<3 | 2
	listItems    = 2<<3 | 2
)

func protobufMagic() []byte { return []byte{'k', '8', 's', 0} }

func (protobufEncoding) contentType() string { return typeProtobuf }
func (protobufEncoding) streamType() string  { return typeProtobuf + ";stream=watch" }

func envelope(meta metav1.TypeMeta, message []byte) ([]byte, error) {
	unknown := runtime.Unknown{TypeMeta: runtime.TypeMeta{APIVersion: meta.APIVersion, Kind: meta.Kind}, Raw: message}
	data := make([]byte, len(protobufMagic())+unknown.Size())
	n := copy(data, protobufMagic())
	_, err := unknown.MarshalTo(data[n:])
	return data, err
}

func (protobufEncoding) object(v *Version) ([]byte, error) {
	data, err := v.protobuf()
	if err != nil {
		return nil, err
	}
	return envelope(v.resource.typeMeta(), data)
}

func (protobufEncoding) list(r resource, number uint64, items []*Version) ([]byte, error) {
	listMeta := metav1.ListMeta{ResourceVersion: strconv.FormatUint(number, 10)}
	data, err := listMeta.Marshal()
	if err != nil {
		return nil, err
	}
	message := append(binary.AppendUvarint([]byte{listMetadata}, uint64(len(data))), data...)
	for _, v := range items {
		if data, err = v.protobuf(); err != nil {
			return nil, err
		}
		message = append(binary.AppendUvarint(append(message, listItems), uint64(len(data))), data...)
	}
	meta := r.typeMeta()
	meta.Kind += "List"
	return envelope(meta, message)
}

func (p protobufEncoding) appendEvent(to *bytes.Buffer, event watch.EventType, v *Version) error {
	object, err := p.object(v)
	if err != nil {
		return err
	}
	message := metav1.WatchEvent{Type: string(event), Object: runtime.RawExtension{Raw: object}}
	size := message.Size()
	to.Grow(4 + size)
	data := binary.BigEndian.AppendUint32(to.AvailableBuffer(), uint32(size)) //nolint:gosec // far below 4 GiB
	data = data[:4+size]
	if _, err := message.MarshalTo(data[4:]); err != nil {
		return err
	}
	to.Write(data)
	return nil
}

func (protobufEncoding) status(s *metav1.Status) ([]byte, error) {
	data, err := s.Marshal()
	if err != nil {
		return nil, err
	}
	return envelope(metav1.TypeMeta{APIVersion: "v1", Kind: "Status"}, data)
}
